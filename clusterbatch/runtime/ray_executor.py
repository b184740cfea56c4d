"""The executor that runs work items on Ray: a fixed pool of Ray Data actors."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import numpy as np
import ray

from clusterbatch.errors import ClusterbatchError, InfrastructureError, last_line, root_cause
from clusterbatch.log import say
from clusterbatch.runtime import metrics
from clusterbatch.runtime.work import (
    MOST_LOST,
    TRIES,
    Bundle,
    ItemRunner,
    Pool,
    Work,
    WorkItem,
    attempt,
    in_words,
    lost_items,
    named,
    packed,
    raise_error,
    shortage,
    unpacked,
)
from clusterbatch.store.artifact import Receipt

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BEFORE_FIRST_WORD = 10.0
_SECONDS_BETWEEN_WORDS = 60.0


class RayExecutor:
    """Run items through Ray Data; a session must be connected to a cluster.

    startup_timeout: seconds in which the cluster's autoscaler may start nodes.
    """

    several_processes = True

    def __init__(self, startup_timeout: float = 0.0) -> None:
        self._startup_timeout = startup_timeout

    @property
    def starts_nodes(self) -> bool:
        return self._startup_timeout > 0

    def resources(self) -> Mapping[str, float]:
        found: dict[str, float] = ray.cluster_resources()
        return found

    def call(self, function: Callable[[Any], Any], argument: Any, pool: Pool) -> Any:
        """Return `function(argument)`, computed by a worker: what it holds is not in the driver's memory."""
        try:
            found, error = ray.get(ray.remote(_answer).options(num_cpus=pool.cpus).remote(function, argument))
        except ray.exceptions.RayError as lost:
            raise InfrastructureError(f"{function.__qualname__}: its process was lost ({last_line(lost)})") from lost
        raise_error(function.__qualname__, error)
        return found

    def check_room(self, title: str, bundles: Sequence[Bundle]) -> None:
        """Raise InfrastructureError if the cluster could never start these workers at once: they would wait for ever.

        With a startup time-out the cluster's autoscaler is asked for the nodes first, and has that long to start them.
        The workers themselves keep the nodes from then on, so the request is withdrawn, and idle nodes go when they
        have ended.
        """
        if ray.util.client.ray.is_connected():
            return
        deadline = time.monotonic() + self._startup_timeout
        asked = False
        try:
            while (shortage := _shortage(bundles)) is not None:
                if time.monotonic() >= deadline:
                    raise InfrastructureError(f"{title}: {shortage}")
                if not asked:
                    asked = True
                    # Only if something is short: it costs each process some tenths of a second.
                    from ray.autoscaler.sdk import request_resources

                    say(f"{title}: {shortage}; waiting for nodes")
                    request_resources(bundles=list(bundles))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            if asked:
                request_resources(bundles=[])

    def run(self, work: Work, items: Sequence[WorkItem]) -> Iterator[Receipt]:
        workers = min(work.pool.workers, len(items))
        bundles = [work.pool.bundle] * workers
        preparers = min(work.ahead.pool.workers, len(items)) if work.ahead else 0
        if work.ahead:
            # Both pools run at once.
            bundles += [work.ahead.pool.bundle] * preparers
        self.check_room(work.title, bundles)
        unfinished = {item.number for item in items}
        try:
            with _lost_items_left_out(), announced_wait(work.title, bundles):
                for row in _dataset(work, items, workers, preparers).iter_rows():
                    receipt = _read_row(work.title, row)
                    unfinished.discard(receipt.unit)
                    yield receipt
        except (ClusterbatchError, RuntimeError):
            raise
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, ClusterbatchError):
                raise cause from error
            raise InfrastructureError(
                f"{work.title}: {last_line(error)} (not finished: {named(unfinished)})"
            ) from error
        if unfinished:
            raise InfrastructureError(lost_items(work.title, unfinished))


def _answer(function: Callable[[Any], Any], argument: Any) -> tuple[Any, str]:
    return attempt(lambda: function(argument))


def _dataset(work: Work, items: Sequence[WorkItem], workers: int, preparers: int) -> Any:
    rows = [{"item": packed(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(items))
    # A lost actor is always replaced, as losses are normal on spot machines; its item is tried a limited number of
    # times (Ray Data's default is unlimited).
    options = {"batch_size": 1, "max_restarts": -1, "max_task_retries": TRIES - 1}
    with warnings.catch_warnings():
        # Ray 2.60 deprecates options without a name of their own; it has no other way to limit the tries.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return _mapped(dataset, work, workers, preparers, options)


def _mapped(dataset: Any, work: Work, workers: int, preparers: int, options: dict[str, Any]) -> Any:
    if work.ahead:
        dataset = dataset.map_batches(
            _AheadAdapter,
            fn_constructor_kwargs={"preparer": work.ahead.preparer, "arguments": dict(work.ahead.arguments)},
            compute=ray.data.ActorPoolStrategy(size=preparers),
            num_cpus=work.ahead.pool.cpus,
            **options,
        )
    return dataset.map_batches(
        _Adapter,
        fn_constructor_kwargs={"work": work},
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=work.pool.cpus,
        num_gpus=work.pool.gpus or None,
        **options,
    )


@contextmanager
def _lost_items_left_out() -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    before = context.max_errored_blocks
    context.max_errored_blocks = MOST_LOST
    try:
        yield
    finally:
        context.max_errored_blocks = before


def _read_row(title: str, row: Mapping[str, Any]) -> Receipt:
    raise_error(title, row["error"])
    return Receipt.model_validate_json(row["receipt"])


class _AheadAdapter:
    """Ray Data's calling convention around a `Preparer`."""

    def __init__(self, preparer: type, arguments: dict[str, Any]) -> None:
        metrics.count_retries()
        self._preparer, self._error = attempt(lambda: preparer(**arguments))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        item, prepared, error = batch["item"][0], None, self._error
        if not error:
            prepared, error = attempt(lambda: packed(self._preparer.prepare(unpacked(item))))
        return {"item": [item], "prepared": [prepared or b""], "error": [error]}


class _Adapter:
    """Ray Data's calling convention around an `ItemRunner`."""

    def __init__(self, work: Work) -> None:
        metrics.count_retries()
        self._runner, self._error = attempt(lambda: ItemRunner(work))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        receipt: Receipt | None = None
        error = (batch["error"][0] if "error" in batch else "") or self._error
        if not error:
            prepared = [unpacked(batch["prepared"][0])] if "prepared" in batch else []
            receipt, error = attempt(lambda: self._runner.run(unpacked(batch["item"][0]), *prepared))
        return {"receipt": [receipt.model_dump_json() if receipt else ""], "error": [error]}


@contextmanager
def announced_wait(title: str, bundles: Sequence[Bundle]) -> Iterator[None]:
    """Say during the block when workers that ask for `bundles` have to wait for resources that others hold."""
    if ray.util.client.ray.is_connected():
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(title, bundles, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(title: str, bundles: Sequence[Bundle], ended: threading.Event) -> None:
    since, next_word = datetime.now(), _SECONDS_BEFORE_FIRST_WORD
    begun = time.monotonic()
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        elapsed = time.monotonic() - begun
        if elapsed < next_word:
            continue
        try:
            waiting = sum(_pending(bundle) for bundle in _distinct(bundles))
        except Exception:
            # Ray's view of its demands serves the message alone: no pass fails without it.
            return
        if not waiting:
            if elapsed > _SECONDS_BETWEEN_WORDS:
                return
            continue
        next_word = elapsed + _SECONDS_BETWEEN_WORDS
        wanted = " or ".join(in_words(bundle) for bundle in _distinct(bundles))
        say(
            f"{title}: {waiting} of {len(bundles)} workers waiting since {since:%H:%M:%S} for {wanted}, "
            "which the cluster has but others hold"
        )


def _pending(bundle: Bundle) -> int:
    """Count the requests for a bundle that wait for a place, whoever made them."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
    return sum(
        request.count
        for demand in [*demands.ray_task_actor_demand, *demands.placement_group_demand]
        for request in demand.bundles_by_count
        if _equal(request.bundle, bundle)
    )


def _equal(one: Mapping[str, float], other: Bundle) -> bool:
    # Ray rounds shares of a CPU or a GPU.
    return one.keys() == other.keys() and all(math.isclose(one[name], other[name], abs_tol=1e-3) for name in other)


def _distinct(bundles: Sequence[Bundle]) -> list[Bundle]:
    return [bundle for number, bundle in enumerate(bundles) if bundle not in bundles[:number]]


def _shortage(bundles: Sequence[Bundle]) -> str | None:
    """Return what is missing, in words; None if all workers find a place on the existing nodes."""
    return shortage(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]], "the cluster")
