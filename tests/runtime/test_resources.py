"""What a worker asks of a cluster's GPUs."""

import pytest

from clusterbatch.runtime.resources import device_for, gpus_for


def _cluster(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})})


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 16])
def test_all_workers_find_a_place_and_none_could_have_more(
    monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int
) -> None:
    _cluster(monkeypatch, gpus)
    share = gpus_for("auto", workers)
    on_one_gpu = round(1 / share)
    assert share == 1 / on_one_gpu
    assert on_one_gpu * gpus >= workers
    assert share == 1 or (on_one_gpu - 1) * gpus < workers


def test_auto_is_what_the_cluster_has_not_what_the_driver_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, 0)
    assert (device_for("auto"), gpus_for("auto", 2)) == ("cpu", 0.0)
    # Nodes with GPUs that are yet to be started.
    assert gpus_for("cuda", 2) == 1.0
    _cluster(monkeypatch, 4)
    assert (device_for("auto"), device_for("cpu"), gpus_for("cpu", 2)) == ("cuda", "cpu", 0.0)


def test_what_the_configuration_asks_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, 1)
    assert gpus_for("auto", 2, each=0.25) == 0.25
    assert gpus_for("cpu", 2, each=0.25) == 0.0
