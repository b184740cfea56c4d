"""What a worker asks of a cluster's GPUs."""

from collections.abc import Iterator
from typing import Any

import pytest

from clusterbatch.errors import InfrastructureError
from clusterbatch.runtime import Pool, ray_executor, resources
from clusterbatch.runtime.executor import using
from clusterbatch.runtime.ray_executor import RayExecutor
from clusterbatch.runtime.resources import check_bundles, check_resources, device_for, gpus_for


@pytest.fixture(autouse=True)
def _on_ray() -> Iterator[None]:
    with using(RayExecutor()):
        yield


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


def test_auto_on_a_cluster_that_starts_nodes_says_once_that_it_is_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources._say_auto_is_cpu.cache_clear()
    _cluster(monkeypatch, 0)
    assert device_for("auto") == "cpu"
    assert not capsys.readouterr().err
    with using(RayExecutor(startup_timeout=300.0)):
        assert [device_for("auto"), device_for("cpu"), device_for("auto")] == ["cpu"] * 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "set *.device=cuda" in lines[0]
    resources._say_auto_is_cpu.cache_clear()
    _cluster(monkeypatch, 1)
    assert device_for("auto") == "cuda"
    assert not capsys.readouterr().err


def _nodes(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> list[dict[str, Any]]:
    """Ray has these nodes; what is asked of its autoscaler is kept in the list, and is never started."""
    listed = [{"Alive": True, "Resources": node} for node in nodes]
    listed.append({"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}})
    monkeypatch.setattr("ray.nodes", lambda: listed)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda **request: asked.append(request))
    return asked


def test_two_pools_ask_for_what_they_need_and_not_for_the_larger_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _nodes(monkeypatch, {"CPU": 16.0, "GPU": 1.0})
    workers, preparers = [Pool(1, 2.0, 1.0).bundle], [Pool(8).bundle] * 8
    check_bundles("embed", workers + preparers)
    with pytest.raises(InfrastructureError, match="room for 16; ask for fewer workers"):
        check_bundles("embed", workers + preparers * 2)


def test_gpus_are_left_to_those_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _nodes(monkeypatch, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0})
    # In the order given, the small ones would take the first node.
    check_bundles("embed", [Pool(4, 1.0).bundle] * 4 + [Pool(1, 4.0, 1.0).bundle])


def test_workers_of_one_pool_fill_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    _nodes(monkeypatch, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0})
    check_resources("train", 9, Pool(9, 0.9, 1 / 3))
    words = "^train: 10 workers of 0.9 CPU and 0.333333 GPU each, the cluster has room for 9; ask for fewer workers$"
    with pytest.raises(InfrastructureError, match=words):
        check_resources("train", 10, Pool(10, 0.9, 1 / 3))


def test_the_autoscaler_is_asked_for_what_the_workers_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _nodes(monkeypatch, {"CPU": 2.0})
    monkeypatch.setattr(ray_executor, "_SECONDS_BETWEEN_LOOKS", 0.03)
    bundles = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 0.9}, {"CPU": 0.9}]
    with using(RayExecutor(startup_timeout=0.02)), pytest.raises(InfrastructureError, match="needs 1 GPU"):
        check_bundles("embed", bundles)
    # And withdrawn in the end.
    assert asked == [{"bundles": bundles}, {"bundles": []}]
