"""The scale model's coefficients: measured on two small finished runs, or those of this file's table for GPUs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError, UsageError
from clusterbatch.experiments.capacity.scale_model import CapacityModel, Coefficients, Shape
from clusterbatch.experiments.capacity.workload import model_of
from clusterbatch.pipeline.summary import finished_stages
from clusterbatch.store.workspace import STAGE_ARTIFACTS
from clusterbatch.training.metrics import peak_flops

_DEFAULT = "coefficients.json"
# Share of a GPU's peak that is taken as reached. Measured on an H200: .35 in embedding at BERT-base's size, .17 at
# MiniLM's; training was not.
_UTILISATION = 0.3
_CHARACTERS_PER_TOKEN = 4


# Dense bfloat16 (float16 before Ampere) peak in FLOP/s, from the data sheets.
GPUS: Mapping[str, float] = {
    "t4": 65e12,
    "l4": 121e12,
    "a10g": 70e12,
    "l40s": 362e12,
    "a100": 312e12,
    "h100": 989e12,
}


@dataclass(frozen=True)
class Measured:
    """One finished run: seconds by stage beside the model of what was done."""

    model: CapacityModel
    seconds: Mapping[str, float]


def measure(config: RunConfig) -> Measured:
    """Return the times of a workspace whose run is finished. Raises DataError if a stage is missing."""
    seconds = {stage: manifest.seconds for stage, generation, manifest in finished_stages(config) if not generation}
    missing = [stage for stage in STAGE_ARTIFACTS if stage not in seconds]
    if missing:
        raise DataError(f"{config.workspace}: no finished {missing[0]} here; run it first")
    return Measured(model_of(config), seconds)


def fit(small: Measured, large: Measured, matrix_flops: float, machine: str = platform.machine()) -> Coefficients:
    """Return the line through two runs of different size, stage by stage.

    If the larger run took no longer, time is noise and fixed cost: then the rate is the larger run's own, and fixed
    is zero. Raises UsageError if the runs are of one size.
    """
    fixed, rate = {}, {}
    for stage in STAGE_ARTIFACTS:
        name = large.model.rate_name(stage)
        points = []
        for run in (small, large):
            seconds, workers = run.seconds[stage], run.model.workers(stage)
            if stage == "cluster":
                seconds = max(0.1, seconds - run.model.clustering_flops() / (matrix_flops * workers))
            points.append((run.model.work(stage) / workers, seconds))
        (work, seconds), (more_work, more_seconds) = points
        if more_work < 1.5 * work:
            raise UsageError(f"{stage}: the larger run should have at least 1.5 times the work of the smaller one")
        slope = (more_seconds - seconds) / (more_work - work)
        fixed[name] = max(0.0, seconds - slope * work) if slope > 0 else 0.0
        rate[name] = more_work / max(1e-3, more_seconds - fixed[name])
    return Coefficients(machine, fixed, rate, matrix_flops)


def matrix_flops() -> float:
    """Measure the FLOP/s of one thread in float32, as a clustering worker computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return peak_flops(torch.device("cpu"), torch.float32)
    finally:
        torch.set_num_threads(threads)


def on_gpu(coefficients: Coefficients, peak: float, surrogate: Shape, trained: Shape) -> Coefficients:
    """Return coefficients of the machine with a GPU of `peak` FLOP/s for every worker that embeds, trains or evaluates.

    Ingest and clustering stay on CPUs, training a static encoder stays as it was measured: it waits for memory, not
    for arithmetic.
    """
    flops = _UTILISATION * peak
    # Two models, before and after, read each text of the collections.
    evaluation = flops / (2 * 2.0 * max(surrogate.weights, trained.weights) / _CHARACTERS_PER_TOKEN)
    rates = {"embed": flops, "train backbone": flops, "evaluate": evaluation}
    return replace(coefficients, rate={**coefficients.rate, **rates})


def load(path: str | None = None) -> Coefficients:
    """Read coefficients from a file that `save` wrote; by default those that come with the package.

    Raises UsageError if it cannot be read.
    """
    try:
        text = Path(path).read_text() if path else (files("clusterbatch.experiments.capacity") / _DEFAULT).read_text()
        return Coefficients(**json.loads(text))
    except OSError as error:
        raise UsageError(f"coefficients {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UsageError(f"coefficients {path}: not a file of coefficients") from None


def save(coefficients: Coefficients, path: str) -> None:
    """Write coefficients to a file; those of the other kind of training (static, backbone) in it are kept."""
    if Path(path).exists():
        before = load(path)
        coefficients = replace(
            coefficients,
            fixed={**before.fixed, **coefficients.fixed},
            rate={**before.rate, **coefficients.rate},
        )
    Path(path).write_text(json.dumps(asdict(coefficients), indent=1) + "\n")
