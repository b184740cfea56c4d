"""Fixed units of work through a fixed pool of Ray Data actors: the motor of every stage.

A unit is a small dictionary with a number; what it yields is on storage (parts and a receipt), and only the receipt
comes back. So the driver's memory does not grow with the corpus, a crash re-does units without a receipt, and the
outcome does not depend on which worker did what when.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray

from clusterbatch import errors
from clusterbatch.errors import ClusterbatchError, InfrastructureError, root_cause
from clusterbatch.runtime import metrics
from clusterbatch.runtime.progress import ProgressLine
from clusterbatch.runtime.resources import Pool, check_bundles
from clusterbatch.store.artifact import Receipt

_BUG = "bug"


@dataclass(frozen=True)
class Unit:
    """One piece of work. `rows` is only for progress; `payload` must be picklable and small."""

    number: int
    rows: int
    payload: Any


class UnitWorker(Protocol):
    """Built once per actor (weights are loaded there), then called with one unit at a time."""

    def process(self, unit: Unit) -> Receipt:
        """Does the unit, leaves parts and receipt on storage, returns the receipt.

        Where `run_units` is given an `Ahead`, what that prepared comes as a second argument.
        """
        ...


class UnitPreparer(Protocol):
    """Built once per actor of an `Ahead`."""

    def prepare(self, unit: Unit) -> Any:
        """What the worker needs of the unit; picklable."""
        ...


@dataclass(frozen=True)
class Ahead:
    """A pool that prepares units ahead of the workers, as CPUs that read and tokenise do for GPUs.

    `preparer(**arguments).prepare(unit)`; Ray Data bounds how much of it waits in the object store.
    """

    preparer: type
    arguments: Mapping[str, Any]
    pool: Pool


def run_units(
    title: str,
    units: Sequence[Unit],
    worker: type,
    arguments: Mapping[str, Any],
    pool: Pool,
    *,
    done: Mapping[int, Receipt] | None = None,
    measured_in: str = "rows",
    ahead: Ahead | None = None,
) -> list[Receipt]:
    """Runs `worker(**arguments).process(unit)` for every unit that is not in `done`; returns all receipts by number.

    `measured_in` says what `Unit.rows` counts where it is not rows. With `ahead`, units are prepared by another pool.

    Raises the worker's own ClusterbatchError where one caused the failure, else InfrastructureError.
    """
    receipts: dict[int, Receipt] = dict(done or {})
    pending = [unit for unit in units if unit.number not in receipts]
    total = sum(unit.rows for unit in units)
    with ProgressLine(title, total, measured_in) as line:
        line.start_at(total - sum(unit.rows for unit in pending))
        if pending:
            metrics.pass_begun(title, waiting=len(pending))
            for receipt, rows in _stream(title, pending, worker, arguments, pool, ahead):
                receipts[receipt.unit] = receipt
                metrics.unit_finished(title, receipt, waiting=len(units) - len(receipts))
                line.advance(rows, receipt.details.get("progress", ""))
    return [receipts[unit.number] for unit in units]


def _stream(
    title: str,
    pending: Sequence[Unit],
    worker: type,
    arguments: Mapping[str, Any],
    pool: Pool,
    ahead: Ahead | None,
) -> Any:
    workers = min(pool.workers, len(pending))
    bundles = [pool.bundle] * workers
    if ahead:
        # Both pools run at once.
        preparers = min(ahead.pool.workers, len(pending))
        bundles += [ahead.pool.bundle] * preparers
    check_bundles(title, bundles)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"unit": pickle.dumps(unit)} for unit in pending]
    dataset = ray.data.from_items(items, override_num_blocks=len(pending))
    if ahead:
        dataset = dataset.map_batches(
            _AheadAdapter,
            fn_constructor_kwargs={"preparer": ahead.preparer, "arguments": dict(ahead.arguments)},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=preparers),
            num_cpus=ahead.pool.cpus,
        )
    dataset = dataset.map_batches(
        _Adapter,
        fn_constructor_kwargs={"worker": worker, "arguments": dict(arguments)},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                kind, _, message = row["error"].partition(": ")
                if kind == _BUG:
                    raise RuntimeError(f"{title}: a worker failed\n{message}")
                raise getattr(errors, kind, ClusterbatchError)(message)
            yield Receipt.model_validate_json(row["receipt"]), int(row["rows"])
    except (ClusterbatchError, RuntimeError):
        raise
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, ClusterbatchError):
            raise cause from error
        raise InfrastructureError(f"{title}: {_last_line(error)}") from error


class _AheadAdapter:
    """Ray Data's calling convention around a `UnitPreparer`."""

    def __init__(self, preparer: type, arguments: dict[str, Any]) -> None:
        metrics.count_retries()
        self._preparer = preparer(**arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        unit = batch["unit"][0]
        prepared, error = _attempt(lambda: pickle.dumps(self._preparer.prepare(pickle.loads(unit))))
        return {"unit": [unit], "prepared": [prepared or b""], "error": [error]}


class _Adapter:
    """Ray Data's calling convention around a `UnitWorker`."""

    def __init__(self, worker: type, arguments: dict[str, Any]) -> None:
        metrics.count_retries()
        self._worker = worker(**arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        unit: Unit = pickle.loads(batch["unit"][0])
        receipt: Receipt | None = None
        error = batch["error"][0] if "error" in batch else ""
        if not error:
            prepared = [pickle.loads(batch["prepared"][0])] if "prepared" in batch else []
            receipt, error = _attempt(lambda: self._worker.process(unit, *prepared))
        return {"receipt": [receipt.model_dump_json() if receipt else ""], "rows": [unit.rows], "error": [error]}


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or what went wrong as data: through Ray's own wrapping the cause would lose its type and message."""
    try:
        return work(), ""
    except ClusterbatchError as error:
        return None, f"{type(error).__name__}: {error}"
    except Exception:
        return None, f"{_BUG}: {traceback.format_exc()}"


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(root_cause(error)).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
