"""Coefficients of the scale model: measured on two small finished runs, or those of this file's table for GPUs."""

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
from clusterbatch.experiments.capacity.scale_model import CapacityModel, Coefficients
from clusterbatch.experiments.capacity.sizes import Shape
from clusterbatch.experiments.capacity.workload import model_of
from clusterbatch.pipeline.run_figures import training_lines
from clusterbatch.pipeline.summary import finished_stages
from clusterbatch.store.workspace import STAGE_ARTIFACTS, Workspace
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
    """One finished run: the model of its work and, by stage, wall seconds and those of all workers' own clocks."""

    model: CapacityModel
    seconds: Mapping[str, float]
    worker_seconds: Mapping[str, float]


def measure(config: RunConfig) -> Measured:
    """Return the times of a workspace whose run is finished.

    Raises DataError if a stage is missing, or was made before workers kept their time.
    """
    found = {stage: manifest for stage, generation, manifest in finished_stages(config) if not generation}
    missing = [stage for stage in STAGE_ARTIFACTS if stage not in found]
    if missing:
        raise DataError(f"{config.workspace}: no finished {missing[0]} here; run it first")
    model = model_of(config)
    worker_seconds = {}
    for stage in STAGE_ARTIFACTS:
        measured = found[stage].worker_seconds
        if measured is None:
            raise DataError(f"{config.workspace}: {stage} has no times of its workers; run it again")
        worker_seconds[stage] = measured
    # The workers of training take every step together.
    steps = training_lines(Workspace(config).train(), found["train"])
    worker_seconds["train"] = model.workers("train") * sum(step["seconds"] for step in steps)
    return Measured(model, {stage: found[stage].seconds for stage in STAGE_ARTIFACTS}, worker_seconds)


def fit(small: Measured, large: Measured, matrix_flops: float, machine: str = platform.machine()) -> Coefficients:
    """Fit the coefficients to two runs of different sizes, stage by stage.

    The rate is that at which the workers' own clocks grow from the smaller run to the larger one; what is left of them
    is a start of each worker (its model, its first product). What else a stage took, start-up of processes and the
    driver, is fixed, and grows with the work if the larger run has more than twice the smaller one's.

    Raises UsageError if the runs are of one size.
    """
    fixed, rate, serial = {}, {}, {}
    for stage in STAGE_ARTIFACTS:
        name = large.model.rate_name(stage)
        work, more_work = small.model.work(stage), large.model.work(stage)
        if more_work < 1.5 * work:
            raise UsageError(f"{stage}: the larger run should have at least 1.5 times the work of the smaller one")
        busy, more_busy = (
            run.worker_seconds[stage] - run.model.product_flops(stage) / matrix_flops for run in (small, large)
        )
        # Where products are all of it, or faster than `matrix_flops`, or both took as long, a tenth is left.
        each = max(
            1e-3 / more_work, 0.1 * large.worker_seconds[stage] / more_work, (more_busy - busy) / (more_work - work)
        )
        rate[name] = 1 / each
        start = max(0.0, more_busy - each * more_work) / large.model.workers(stage)
        rest, more_rest = (
            max(0.0, run.seconds[stage] - run.worker_seconds[stage] / run.model.workers(stage))
            for run in (small, large)
        )
        growth = max(0.0, more_rest - rest)
        # Starts differ by seconds from one time to the next, and passes over few items by an item's time.
        serial[name] = growth / (more_work - work) if growth > rest else 0.0
        fixed[name] = start + (max(0.0, rest - serial[name] * work) if serial[name] else max(rest, more_rest))
    return Coefficients(machine, fixed, rate, matrix_flops, serial)


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

    Ingest and clustering stay on CPUs, static encoders stay as they were measured: they wait for memory, not for
    arithmetic.
    """
    flops = _UTILISATION * peak
    rates = {"embed backbone": flops, "train backbone": flops}
    if weights := max(surrogate.weights, trained.weights):
        # Two models, before and after, read each text of the collections.
        rates["evaluate backbone"] = flops / (2 * 2.0 * weights / _CHARACTERS_PER_TOKEN)
    return replace(coefficients, rate={**coefficients.rate, **rates})


def load(path: str | None = None) -> Coefficients:
    """Read coefficients from a file that `save` wrote; by default those that come with the package.

    The latter also stand in for stages and kinds of encoders that the file does not have. Raises UsageError if it
    cannot be read.
    """
    packaged = _read((files("clusterbatch.experiments.capacity") / _DEFAULT).read_text())
    if path is None:
        return packaged
    return _merged(packaged, _read_file(path))


def check_writable(path: str) -> None:
    """Raise UsageError if `save` could not write there."""
    if Path(path).exists():
        _read_file(path)
    elif not Path(path).absolute().parent.is_dir():
        raise UsageError(f"coefficients {path}: its folder does not exist")


def _read_file(path: str) -> Coefficients:
    try:
        return _read(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"coefficients {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"coefficients {path}: not a file of coefficients") from None


def _read(text: str) -> Coefficients:
    found = Coefficients(**json.loads(text))
    return replace(found, fixed=_named(found.fixed), rate=_named(found.rate), serial=_named(found.serial))


def _named(values: Mapping[str, float]) -> dict[str, float]:
    """Return coefficients by the names of today: once, all encoders but that of training were taken as transformers."""
    return {f"{name} backbone" if name in ("embed", "evaluate") else name: value for name, value in values.items()}


def _merged(before: Coefficients, coefficients: Coefficients) -> Coefficients:
    """Return `coefficients`, and those of `before` that they lack."""
    lacking = before.rate.keys() - coefficients.rate.keys()
    kept = {name: value for name, value in before.serial.items() if name in lacking}
    return replace(
        coefficients,
        fixed={**before.fixed, **coefficients.fixed},
        rate={**before.rate, **coefficients.rate},
        serial={**kept, **coefficients.serial},
    )


def save(coefficients: Coefficients, path: str) -> None:
    """Write coefficients to a file; those of the other kind of training (static, backbone) in it are kept."""
    if Path(path).exists():
        coefficients = _merged(_read_file(path), coefficients)
    Path(path).write_text(json.dumps(asdict(coefficients), indent=1) + "\n")
