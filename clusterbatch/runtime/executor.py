"""Executors, which run work items. Ray's is in `ray_executor`; the one here uses this process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from clusterbatch.cores import available_cores
from clusterbatch.runtime.metrics import count_retries
from clusterbatch.runtime.work import Bundle, ItemRunner, Pool, Work, WorkItem, packed, unpacked
from clusterbatch.store.artifact import Receipt


class Executor(Protocol):
    """Interface that runs work items and single calls, and tells what there is to run them on."""

    @property
    def several_processes(self) -> bool:
        """Return whether a training or a fit can be spread over several processes."""
        ...

    @property
    def starts_nodes(self) -> bool:
        """Return whether nodes may be started on request, so that missing resources may still come."""
        ...

    def resources(self) -> Mapping[str, float]:
        """Return what all nodes have together, by Ray's names (CPU, GPU)."""
        ...

    def check_room(self, title: str, bundles: Sequence[Bundle]) -> None:
        """Raise InfrastructureError if workers that ask for these bundles could never run at once."""
        ...

    def call(self, function: Callable[[Any], Any], argument: Any, pool: Pool) -> Any:
        """Return `function(argument)`, computed outside the driver if possible."""
        ...

    def run(self, work: Work, items: Sequence[WorkItem]) -> Iterator[Receipt]:
        """Yield the receipt of each item as it is finished, in any order.

        Raises the worker's own ClusterbatchError if one caused a failure, InfrastructureError if workers were lost for
        good, and something else for a bug.
        """
        ...


class InProcessExecutor:
    """Run everything in this process: for a debugger, for small corpora and for tests.

    Arguments and items go through pickle, so that what works here works on Ray. Errors are raised as they are.

    reverse: run items last first, to show that no result depends on their order.
    """

    several_processes = False
    starts_nodes = False

    def __init__(self, *, reverse: bool = False) -> None:
        self._reverse = reverse

    def resources(self) -> Mapping[str, float]:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return {"CPU": float(available_cores()), **({"GPU": float(gpus)} if gpus else {})}

    def check_room(self, title: str, bundles: Sequence[Bundle]) -> None:
        """Accept anything: one process takes the place of all workers."""

    def call(self, function: Callable[[Any], Any], argument: Any, pool: Pool) -> Any:
        return function(unpacked(packed(argument)))

    def run(self, work: Work, items: Sequence[WorkItem]) -> Iterator[Receipt]:
        count_retries()
        work = _own_copy(work)
        preparer = work.ahead.preparer(**unpacked(packed(dict(work.ahead.arguments)))) if work.ahead else None
        runner = ItemRunner(work)
        for item in reversed(items) if self._reverse else items:
            copy: WorkItem = unpacked(packed(item))
            prepared = [] if preparer is None else [unpacked(packed(preparer.prepare(copy)))]
            yield runner.run(copy, *prepared)


def _own_copy(work: Work) -> Work:
    """Return `work` with its own copy of arguments and output, as another process would have."""
    arguments, output = unpacked(packed((dict(work.arguments), work.output)))
    return replace(work, arguments=arguments, output=output)


_current: Executor | None = None


def current_executor() -> Executor:
    """Return the executor of the session that is open. Raises RuntimeError outside `ray_session`."""
    if _current is None:
        raise RuntimeError("no session is open: use clusterbatch.runtime.ray_session")
    return _current


def installed_executor() -> Executor | None:
    """Return the executor of the session that is open, or None outside one."""
    return _current


@contextmanager
def using(executor: Executor) -> Iterator[None]:
    """Make `executor` the current one for the block."""
    global _current
    before, _current = _current, executor
    try:
        yield
    finally:
        _current = before
