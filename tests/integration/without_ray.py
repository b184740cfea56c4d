"""Stages without Ray: their workers' work in this process, one after the other. What they do is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from clusterbatch.clustering import drift_passes, passes
from clusterbatch.clustering import stage as clustering
from clusterbatch.corpus import ingest, inputs
from clusterbatch.corpus import passes as corpus_passes
from clusterbatch.encoder import stage as encoder
from clusterbatch.evaluation import stage as evaluation
from clusterbatch.experiments import compare, predict, refresh, refresh_interval, tune
from clusterbatch.mining import stage as mining
from clusterbatch.runtime import Unit
from clusterbatch.store import Receipt
from clusterbatch.training import stage as training
from clusterbatch.training.gather import World
from clusterbatch.training.worker import TrainingJob, run_worker

# With these no stage asks Ray what the cluster has.
WORDS = [
    "embed.device=cpu",
    "embed.tokenizers=0",
    "cluster.device=cpu",
    "train.device=cpu",
    "evaluate.device=cpu",
    "train.trackers=[]",
]


def stages_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in _MODULES:
        for name, replacement in _REPLACEMENTS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)


def _run_units(
    title: str,
    units: Sequence[Unit],
    worker: type,
    arguments: Mapping[str, Any],
    pool: Any,
    *,
    done: Mapping[int, Receipt] | None = None,
    measured_in: str = "rows",
    ahead: None = None,
) -> list[Receipt]:
    receipts = dict(done or {})
    pending = [unit for unit in units if unit.number not in receipts]
    made = worker(**arguments) if pending else None
    receipts |= {unit.number: made.process(unit) for unit in pending}
    return [receipts[unit.number] for unit in units]


def _fit(job: TrainingJob) -> None:
    run_worker(job, World(), torch.device("cpu"))


_MODULES = (
    compare,
    predict,
    refresh,
    refresh_interval,
    tune,
    ingest,
    inputs,
    corpus_passes,
    encoder,
    mining,
    drift_passes,
    passes,
    clustering,
    training,
    evaluation,
)
_REPLACEMENTS: dict[str, Any] = {
    "run_units": _run_units,
    "ray_session": lambda config: nullcontext(),
    "run_on_worker": lambda function, argument, pool: function(argument),
    "gpus_for": lambda device, workers, each=None: 0.0,
    "device_for": lambda device: "cpu" if device == "auto" else device,
    "_fit": _fit,
}
