"""Work items whose workers write their own receipts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clusterbatch.runtime.passes import run_items
from clusterbatch.runtime.work import Ahead, Pool, Work, WorkItem
from clusterbatch.store.artifact import Receipt

Unit = WorkItem


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
    """Run `worker(**arguments).process(unit)`, which returns a receipt, for every unit not in `done`."""
    work = Work(title, worker, arguments, pool, ahead, receipts_by_worker=True)
    return run_items(work, units, done or {}, measured_in)
