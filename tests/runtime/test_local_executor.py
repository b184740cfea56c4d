"""Passes in forked processes of this machine: results and failures as on Ray, and what forking itself promises."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.runtime import (
    Ahead,
    Executor,
    InProcessExecutor,
    LocalExecutor,
    Pass,
    Pool,
    Result,
    WorkItem,
    local_executor,
)
from clusterbatch.runtime.executor import using
from clusterbatch.runtime.fork_server import ForkServer
from clusterbatch.runtime.work import TRIES, Work
from tests.runtime.test_passes import POOL, Words, comparable, items, squares, values


@pytest.fixture(scope="module")
def local() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(2)
    yield executor
    executor.close()


@pytest.mark.parametrize("ahead", [None, Ahead(Words, {}, POOL)])
def test_forked_processes_leave_the_artifact_of_one_process(
    tmp_path: Path, ahead: Ahead | None, local: LocalExecutor
) -> None:
    made = []
    executors: dict[str, Executor] = {"local": local, "here": InProcessExecutor()}
    for name, executor in executors.items():
        step = squares(tmp_path, name=name, ahead=ahead)
        assert step.output is not None
        with using(executor):
            manifest = step.commit(items(4))
        made.append((comparable(manifest), values(step.output, manifest)))
    assert made[0] == made[1]


def test_an_environment_may_be_large(local: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes tells every pod of every service of its namespace, in some seven variables each."""
    for number in range(8000):
        monkeypatch.setenv(f"SERVICE_{number}_PORT", f"tcp://10.0.0.1:{number}")
    assert local.call(os.getenv, "SERVICE_7999_PORT", Pool(1)) == "tcp://10.0.0.1:7999"


def test_closing_does_not_wait_for_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may take longer to import than a supervisor waits between SIGTERM and SIGKILL."""
    begun, done = tmp_path / "begun", tmp_path / "done"
    touch = "pathlib.Path({!r}).touch()"
    program = f"import pathlib, time; {touch.format(str(begun))}; time.sleep(5); {touch.format(str(done))}"
    (tmp_path / "slowly_imported.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    server = ForkServer()

    def fork() -> None:
        with suppress(InfrastructureError):
            server.fork(_nothing, "slowly_imported")

    thread = threading.Thread(target=fork)
    thread.start()
    while not begun.exists():
        time.sleep(0.05)
    server.close()
    thread.join()
    assert not done.exists()


def _nothing(connection: Connection) -> None:
    pass


def test_failures_are_told_in_their_own_words(tmp_path: Path, local: LocalExecutor) -> None:
    with using(local):
        with pytest.raises(DataError, match=r"^file.csv: row 4 is no number$"):
            squares(tmp_path, name="bad", bad=4).run(items(8))
        with pytest.raises(UsageError, match=r"^model: no tokenizer$"):
            squares(tmp_path, name="unusable", unusable=UsageError("model: no tokenizer")).run(items(2))
        with pytest.raises(DataError, match=r"^item 1 cannot be prepared$"):
            squares(tmp_path, name="ahead", ahead=Ahead(Words, {"bad": 1}, POOL)).run(items(2))
        with pytest.raises(RuntimeError, match="squares: a worker failed") as caught:
            squares(tmp_path, name="bug", bug=1).run(items(2))
    assert str(caught.value).count("Traceback") == 1


def test_a_worker_that_is_killed_once_costs_no_item(tmp_path: Path, local: LocalExecutor) -> None:
    with using(local):
        receipts = squares(tmp_path, deadly=2).run(items(6))
    assert (tmp_path / "died").read_bytes() == b"x"
    assert [receipt.unit for receipt in receipts] == list(range(6))


class Brief:
    """Ends its process soon after its first answer."""

    def __init__(self, folder: Path) -> None:
        self._mark = folder / "pid"

    def process(self, item: WorkItem, output: object) -> Result:
        if not self._mark.exists():
            self._mark.write_text(str(os.getpid()))
            threading.Timer(0.2, os._exit, [1]).start()
        return Result()


def test_a_worker_that_dies_between_two_items_costs_none(tmp_path: Path, local: LocalExecutor) -> None:
    receipts = local.run(Work("brief", Brief, {"folder": tmp_path}, POOL), items(3))
    first = next(receipts)
    process = int((tmp_path / "pid").read_text())
    while psutil.pid_exists(process):
        time.sleep(0.02)
    assert sorted([first.unit, *(receipt.unit for receipt in receipts)]) == [0, 1, 2]


def test_an_item_that_kills_every_worker_is_named_after_a_few_tries(tmp_path: Path, local: LocalExecutor) -> None:
    step = squares(tmp_path, always_deadly=3)
    with using(local), pytest.raises(InfrastructureError, match=re.escape("squares: unit 3 lost with the worker")):
        step.run(items(6))
    assert len((tmp_path / "died").read_bytes()) == TRIES
    assert step.begin().keys() == set(range(6)) - {3}


@pytest.mark.parametrize(("pool", "words"), [(Pool(1, gpus=1), "needs 1 GPU"), (Pool(50), "ask for fewer workers")])
def test_what_can_never_run_fails_in_one_line(tmp_path: Path, local: LocalExecutor, pool: Pool, words: str) -> None:
    with using(local), pytest.raises(InfrastructureError, match=words):
        squares(tmp_path, pool=pool).run(items(60))


class Deadly:
    """Kills every worker."""

    def process(self, item: WorkItem, output: None) -> Result:
        os._exit(1)


def test_a_pass_whose_every_item_is_deadly_stops_early(local: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_executor, "MOST_LOST", 1)
    with using(local), pytest.raises(InfrastructureError, match=r"^deadly: units 0, .* and \d+ more lost with"):
        Pass("deadly", None, "f", Deadly, {}, POOL).run(items(12))


class Environment:
    """Tells the number of its process, a variable, and how many threads it was started with."""

    def process(self, item: WorkItem, output: None) -> Result:
        threads = len(os.listdir("/proc/self/task"))
        return Result(details={"pid": os.getpid(), "variable": os.environ.get("GIVEN_LATE"), "threads": threads})


def test_a_local_worker_is_one_process_with_the_drivers_environment(
    local: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with using(local):
        Pass("environment", None, "f", Environment, {}, POOL).run(items(1))
        # After the server was started.
        monkeypatch.setenv("GIVEN_LATE", "yes")
        receipts = Pass("environment", None, "f", Environment, {}, POOL).run(items(3))
    [(pid, variable, threads)] = {tuple(receipt.details.values()) for receipt in receipts}
    assert pid != os.getpid()
    assert variable == "yes"
    # A fork takes no other thread along.
    assert threads == 1


def test_local_calls_answer_or_raise_in_their_own_words(local: LocalExecutor) -> None:
    assert local.call(_twice, 4, POOL) == 8
    with pytest.raises(DataError, match=r"^no number$"):
        local.call(_twice, "four", POOL)
    with pytest.raises(InfrastructureError, match=r"^_twice: its process was lost"):
        local.call(_twice, None, POOL)


def _twice(number: Any) -> int:
    if number is None:
        os._exit(1)
    if isinstance(number, str):
        raise DataError("no number")
    return int(2 * number)


def _sleep(connection: Connection) -> None:
    connection.send("ready")
    time.sleep(600)


def test_workers_end_with_their_server() -> None:
    server = ForkServer()
    worker = server.fork(_sleep, __name__)
    assert worker.connection.recv() == "ready"
    process = psutil.Process(worker.pid)
    server.close()
    assert not psutil.wait_procs([process], timeout=30)[1]
    with pytest.raises(InfrastructureError, match="starts workers is gone"):
        server.fork(_sleep, __name__)
