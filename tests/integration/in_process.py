"""Substitutes for what the stage `cluster` asks of Ray: its units one after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from clusterbatch.clustering import passes, stage
from clusterbatch.runtime import Pool, Unit, metrics
from clusterbatch.store import Receipt


def without_ray() -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """(module, name, substitute) of everything to be replaced."""
    return [
        (passes, "run_units", run_units),
        (stage, "run_on_worker", lambda function, argument, pool: function(argument)),
        (stage, "ray_session", lambda config: nullcontext()),
    ]


def run_units(
    title: str,
    units: Sequence[Unit],
    worker: type,
    arguments: Mapping[str, Any],
    pool: Pool,
    *,
    done: Mapping[int, Receipt] | None = None,
) -> list[Receipt]:
    """As runtime.run_units. Backwards: no result may depend on the order."""
    receipts = dict(done or {})
    made = worker(**arguments) if units else None
    for unit in reversed(units):
        if unit.number not in receipts:
            receipts[unit.number] = made.process(unit)
            metrics.unit_finished(title, receipts[unit.number], waiting=len(units) - len(receipts))
    return [receipts[unit.number] for unit in units]
