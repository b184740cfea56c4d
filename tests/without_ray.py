"""Stages without Ray: what their workers do, done in this process.

The work is the same; starting processes is what takes most of the time of a small run.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

# All that asks for Ray has to be there to be changed.
from clusterbatch.embedding import stage as importing  # noqa: F401
from clusterbatch.evaluation import mteb  # noqa: F401
from clusterbatch.experiments.tune import refresh_interval  # noqa: F401
from clusterbatch.runtime import Ahead, Pool, Unit, metrics, ray_session, resources, run_units
from clusterbatch.shards import passes
from clusterbatch.store import Receipt
from clusterbatch.training import stage as training
from clusterbatch.training.collectives import World
from clusterbatch.training.worker import TrainingJob, run_worker

# With these no stage prepares elsewhere, or asks Ray what the cluster has.
WORDS = [
    "embed.device=cpu",
    "embed.tokenizers=0",
    "cluster.device=cpu",
    "train.device=cpu",
    "evaluate.device=cpu",
    "train.trackers=[]",
]


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """No stage starts or asks Ray from now on. A fit or a training that is told to use several workers still does."""
    replacements: dict[Any, Any] = {
        run_units: _run_units,
        ray_session: lambda config: nullcontext(),
        passes.run_on_worker: lambda function, argument, pool: function(argument),
        resources.gpus_for: lambda device, workers, each=None: 0.0,
        resources.device_for: lambda device: "cpu" if device == "auto" else device,
        training._fit: _fit,
    }
    rooms = [module for name, module in sys.modules.items() if name.startswith("clusterbatch.")]
    for room in rooms:
        # Where they come from they stay: a module that is imported later must not keep a replacement.
        if room.__name__.startswith("clusterbatch.runtime"):
            continue
        for name, value in list(vars(room).items()):
            if callable(value) and value in replacements:
                patch.setattr(room, name, replacements[value])


def _run_units(
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
    """As runtime.run_units. Backwards, as no result may depend on the order; through pickle, as to another process."""
    assert ahead is None, "nothing is prepared elsewhere"
    receipts = dict(done or {})
    pending = [unit for unit in reversed(units) if unit.number not in receipts]
    made = worker(**pickle.loads(pickle.dumps(dict(arguments)))) if pending else None
    for unit in pending:
        receipts[unit.number] = made.process(pickle.loads(pickle.dumps(unit)))
        metrics.unit_finished(title, receipts[unit.number], waiting=len(units) - len(receipts))
    return [receipts[unit.number] for unit in units]


def _fit(job: TrainingJob) -> None:
    run_worker(job, World(), torch.device("cpu"))


# For a process of its own: `python -c DRIVER STAGE CONFIG.json PASS UNITS` ends by its own hand, as a lost machine
# would, when so many units of a pass are whole.
DRIVER = """
import importlib, os, signal, sys
import pytest
from clusterbatch.config import RunConfig
from clusterbatch.runtime import metrics
from tests.without_ray import without_ray

without_ray(pytest.MonkeyPatch())
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
