"""The driver of ranks on this machine: what it says if a worker has lost the others because one of them failed."""

from __future__ import annotations

import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError
from clusterbatch.runtime import LocalExecutor
from clusterbatch.runtime.fork_server import ForkedProcess
from clusterbatch.training import driver
from clusterbatch.training.local_ranks import _lines, _Lost
from clusterbatch.training.worker import TrainingJob


@pytest.fixture
def workers() -> tuple[list[ForkedProcess], list[Connection]]:
    ours, theirs = zip(*(Pipe() for _ in range(2)), strict=True)
    return [ForkedProcess(0, connection) for connection in ours], list(theirs)


def test_a_lost_worker_leaves_time_for_the_reason(workers: tuple[list[ForkedProcess], list[Connection]]) -> None:
    started, (first, second) = workers
    second.send(("lost", "rank 0 could not read the checkpoint"))
    threading.Timer(0.2, first.send, [("DataError", "step=00000010/parameters: damaged")]).start()
    with pytest.raises(DataError, match="parameters: damaged"):
        list(_lines(started))


def test_a_worker_that_is_gone_is_lost_however_the_others_fare(
    workers: tuple[list[ForkedProcess], list[Connection]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clusterbatch.training.local_ranks._SECONDS_TO_EXPLAIN", 0.1)
    started, (first, second) = workers
    first.send(("line", {"step": 3}))
    second.close()
    lines = _lines(started)
    assert next(lines) == {"step": 3}
    with pytest.raises(_Lost, match="a worker was lost"):
        next(lines)


def test_no_worker_starts_without_a_row_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster with more GPUs than a batch has pairs, if `train.workers` is open."""
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(driver, "current_executor", lambda: LocalExecutor.__new__(LocalExecutor))
    monkeypatch.setattr(driver, "all_workers", lambda use_gpu: (64, 64))
    monkeypatch.setattr(
        driver, "fit_on_this_machine", lambda job, fewest, most, executor: started.append((fewest, most))
    )
    for size in (32, 256):
        config = RunConfig.model_validate({"workspace": "/none", "batches": {"size": size}, "train": {"device": "cpu"}})
        driver.fit(TrainingJob(config, 0, 1, "model", "run"))
    assert started == [(32, 32), (64, 64)]
