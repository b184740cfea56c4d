"""What is recorded of a unit and of a training step, under which names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from clusterbatch.config import StorageConfig
from clusterbatch.errors import InfrastructureError
from clusterbatch.runtime import InProcessExecutor, Pass, Pool, WorkItem, metrics
from clusterbatch.runtime.executor import using
from clusterbatch.store import Counts, Part, Receipt, retries

LINE = {
    "step": 7,
    "epoch": 0,
    "loss": 1.5,
    "accuracy": 0.25,
    "hardness": 0.8,
    "mask_rate": 0.01,
    "purity": 0.9,
    "gradient_norm": 2.0,
    "learning_rate": 1e-4,
    "memory_bytes": 10**9,
    "pairs": 256,
    "tokens": 9000,
    "data_wait": 0.25,
    "seconds": 2.0,
}


class Instrument:
    def __init__(self, name: str, seen: dict[Any, float]) -> None:
        self._name, self._seen = name, seen

    def _key(self, tags: dict[str, str]) -> Any:
        assert sorted(tags) == sorted(metrics.MEASURES[self._name].tags)
        return (self._name, *tags.values())

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses to add nothing"
        assert metrics.MEASURES[self._name].kind == "counter"
        self._seen[self._key(tags)] = self._seen.get(self._key(tags), 0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert metrics.MEASURES[self._name].kind == "gauge"
        self._seen[self._key(tags)] = value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert metrics.MEASURES[self._name].kind == "histogram"
        self._seen[self._key(tags)] = value


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    found: dict[Any, float] = {}
    monkeypatch.setattr(metrics, "_instrument", lambda name: Instrument(name, found))
    return found


def test_a_unit(seen: dict[Any, float]) -> None:
    part = Part(path="a", rows=8, bytes=1000, checksum="")
    counts = Counts(read=10, written=8, rejected=0, set_aside={"duplicates": 1, "held out": 1})
    for waiting in (1, 0):
        metrics.unit_finished(
            "embed", Receipt(unit=0, fingerprint="f", parts=[part], counts=counts, seconds=3), waiting
        )
    assert seen == {
        ("clusterbatch_rows", "embed", "read"): 20,
        ("clusterbatch_rows", "embed", "written"): 16,
        ("clusterbatch_rows", "embed", "set_aside"): 4,
        ("clusterbatch_bytes_written", "embed"): 2000,
        ("clusterbatch_units", "embed"): 2,
        ("clusterbatch_units_waiting", "embed"): 0,
        ("clusterbatch_unit_seconds", "embed"): 3,
    }


def test_a_pass_is_seen_before_its_first_unit_ends(seen: dict[Any, float]) -> None:
    """And never again, where that unit never ends."""

    class Stuck(InProcessExecutor):
        def run(self, *_: object) -> Iterator[Receipt]:
            assert seen == {("clusterbatch_units_waiting", "embed"): 2}
            raise InfrastructureError("stuck")
            yield

    items = [WorkItem(number, 1, None) for number in range(3)]
    with using(Stuck()), pytest.raises(InfrastructureError, match="stuck"):
        Pass("embed", None, "f", object, {}, Pool(1)).run(items, done={1: Receipt(unit=1, fingerprint="f")})
    assert seen


def test_a_step_fills_every_training_metric(seen: dict[Any, float]) -> None:
    metrics.step_finished(LINE)
    metrics.step_finished({**LINE, "loss": float("nan"), "data_wait": 0.0})
    assert {name for (name,) in seen} == {name for name in metrics.MEASURES if "_training_" in name}
    assert seen[("clusterbatch_training_pairs",)] == 512
    assert seen[("clusterbatch_training_data_wait_seconds",)] == 0.5


def test_a_repeated_request(seen: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "observers", [])
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    metrics.count_retries()
    metrics.count_retries()
    answers = iter([ConnectionResetError(), ConnectionResetError(), None])

    def call(seconds: float) -> str:
        error = next(answers)
        if error is not None:
            raise error
        return "data"

    assert retries.with_retries("s3://bucket/key", StorageConfig(), call) == "data"
    assert seen == {("clusterbatch_storage_retries",): 2}


def test_names_as_prometheus_has_them() -> None:
    assert metrics.exported_name("clusterbatch_rows") == "ray_clusterbatch_rows_total"
    assert metrics.exported_name("clusterbatch_training_loss") == "ray_clusterbatch_training_loss"
