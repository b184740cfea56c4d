"""What the stages `embed` and `cluster` ask of Ray, without Ray: their units one after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from clusterbatch.clustering import passes
from clusterbatch.clustering import stage as clustering
from clusterbatch.encoder import stage as embedding
from clusterbatch.runtime import Ahead, Pool, Unit, metrics
from clusterbatch.store import Receipt


def without_ray() -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """(module, name, substitute) of everything to be replaced."""
    return [
        (passes, "run_units", run_units),
        (clustering, "run_on_worker", lambda function, argument, pool: function(argument)),
        (clustering, "ray_session", lambda config: nullcontext()),
        (embedding, "run_units", run_units),
        (embedding, "ray_session", lambda config: nullcontext()),
    ]


def run_units(
    title: str,
    units: Sequence[Unit],
    worker: type,
    arguments: Mapping[str, Any],
    pool: Pool,
    *,
    done: Mapping[int, Receipt] | None = None,
    ahead: Ahead | None = None,
) -> list[Receipt]:
    """As runtime.run_units. Backwards: no result may depend on the order."""
    assert ahead is None, "nothing is prepared elsewhere"
    receipts = dict(done or {})
    made = worker(**arguments) if units else None
    for unit in reversed(units):
        if unit.number not in receipts:
            receipts[unit.number] = made.process(unit)
            metrics.unit_finished(title, receipts[unit.number], waiting=len(units) - len(receipts))
    return [receipts[unit.number] for unit in units]


# For a process of its own: `python -c DRIVER STAGE CONFIG.json PASS UNITS` ends by its own hand, as a lost machine
# would, when so many units of a pass are whole.
DRIVER = """
import importlib, os, signal, sys
from clusterbatch.config import RunConfig
from clusterbatch.runtime import metrics
from tests.integration.in_process import without_ray

for module, name, substitute in without_ray():
    setattr(module, name, substitute)
_, stage, config, title, units = sys.argv
seen = 0

def counting(of_pass, receipt, waiting):
    global seen
    seen += of_pass == title
    if seen == int(units):
        os.kill(os.getpid(), signal.SIGKILL)

metrics.unit_finished = counting
room = {"embed": "encoder", "cluster": "clustering"}[stage]
function = getattr(importlib.import_module(f"clusterbatch.{room}.stage"), stage)
function(RunConfig.model_validate_json(open(config).read()))
"""
