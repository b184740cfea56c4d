"""The executor that runs work items in processes of this machine, without Ray."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from clusterbatch.cores import available_cores
from clusterbatch.errors import InfrastructureError
from clusterbatch.runtime.fork_server import ForkedProcess, ForkServer
from clusterbatch.runtime.metrics import count_retries
from clusterbatch.runtime.work import (
    MOST_LOST,
    TRIES,
    Bundle,
    ItemRunner,
    Pool,
    Work,
    WorkItem,
    attempt,
    lost_items,
    raise_error,
    shortage,
)
from clusterbatch.store.artifact import Receipt


class LocalExecutor:
    """Run items in forked processes of this machine.

    Starting them costs next to nothing, so that even a small pass is spread over the cores. A lost process is replaced,
    its item tried again, as on Ray. Items are prepared by the worker itself, without a pool of its own.

    cpus: cores that workers may ask for; None: all of the machine.
    """

    several_processes = True
    starts_nodes = False

    def __init__(self, cpus: int | None = None) -> None:
        self._cpus = float(cpus or available_cores())
        self._server: ForkServer | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End all processes that are left."""
        if self._server is not None:
            self._server.close()

    def resources(self) -> Mapping[str, float]:
        return {"CPU": self._cpus}

    def check_room(self, title: str, bundles: Sequence[Bundle]) -> None:
        """Raise InfrastructureError if the machine has fewer cores than these workers ask for."""
        missing = shortage(bundles, [dict(self.resources())], "this machine")
        if missing is not None:
            raise InfrastructureError(f"{title}: {missing}")

    def start(self, target: Callable[[Connection], None], module: str) -> ForkedProcess:
        """Run `target(connection)` in a process of its own; `module` has what it will need."""
        with self._lock:
            if self._server is None:
                self._server = ForkServer()
        return self._server.fork(target, module)

    def call(self, function: Callable[[Any], Any], argument: Any, pool: Pool) -> Any:
        process = self.start(partial(_answer, function, argument), function.__module__)
        try:
            found, error = process.connection.recv()
        except (EOFError, ConnectionResetError):
            raise InfrastructureError(f"{function.__qualname__}: its process was lost (out of memory?)") from None
        finally:
            process.connection.close()
        raise_error(function.__qualname__, error)
        return found

    def run(self, work: Work, items: Sequence[WorkItem]) -> Iterator[Receipt]:
        workers = min(work.pool.workers, len(items))
        self.check_room(work.title, [work.pool.bundle] * workers)
        waiting, tries = deque(items), Counter[int]()
        lost: set[int] = set()
        busy: dict[Connection, tuple[ForkedProcess, WorkItem]] = {}
        idle: list[ForkedProcess] = []
        try:
            while busy or (waiting and len(lost) <= MOST_LOST):
                while waiting and len(busy) < workers and len(lost) <= MOST_LOST:
                    process = idle.pop() if idle else self.start(partial(_serve, work), work.worker.__module__)
                    busy[process.connection] = process, waiting[0]
                    # If it has died without work, that shows below, where its answer is read.
                    with suppress(BrokenPipeError, ConnectionResetError):
                        process.connection.send(waiting.popleft())
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    process, item = busy.pop(ready)
                    try:
                        receipt, error = ready.recv()
                    except (EOFError, ConnectionResetError):
                        ready.close()
                        tries[item.number] += 1
                        if tries[item.number] < TRIES:
                            waiting.append(item)
                        else:
                            lost.add(item.number)
                        continue
                    idle.append(process)
                    raise_error(work.title, error)
                    yield Receipt.model_validate_json(receipt)
        finally:
            for process, _ in busy.values():
                process.kill()
            for process in idle:
                process.connection.close()
        if lost:
            raise InfrastructureError(lost_items(work.title, lost | {item.number for item in waiting}))


def _answer(function: Callable[[Any], Any], argument: Any, connection: Connection) -> None:
    connection.send(attempt(lambda: function(argument)))


def _serve(work: Work, connection: Connection) -> None:
    """Process the items that come on the connection, until its other end is closed."""
    count_retries()
    runner, unusable = attempt(lambda: ItemRunner(work))
    preparer = None
    if work.ahead and not unusable:
        ahead = work.ahead
        preparer, unusable = attempt(lambda: ahead.preparer(**ahead.arguments))
    while True:
        item: WorkItem = connection.recv()
        receipt: Any = None
        error = unusable
        if not error:
            receipt, error = attempt(
                lambda: runner.run(item) if preparer is None else runner.run(item, preparer.prepare(item))  # noqa: B023
            )
        connection.send((receipt.model_dump_json() if receipt else "", error))
