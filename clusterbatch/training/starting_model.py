"""Facts about the model that training starts from, read from its files without loading a weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from clusterbatch.config import RunConfig, TrainConfig
from clusterbatch.encoder.model_files import Layout, read_layout, shorter
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.untrusted_files import read_config
from clusterbatch.errors import DataError, UsageError

# The rate that an unset train.learning_rate meant in versions that knew one default for all encoders.
FORMER_LEARNING_RATE = 2e-5
_STATIC_RATE = 5e-3
# (weights up to which it applies, rate) of a backbone, by the rates that models of these sizes are fine-tuned with.
_BACKBONE_RATES = [(50e6, 1e-4), (200e6, 5e-5), (math.inf, 2e-5)]


@dataclass(frozen=True)
class StartingModel:
    """weights: number of weights in the files; dimensions: of the model's vectors, None if its files do not say."""

    weights: int
    dimensions: int | None


def read_starting_model(config: RunConfig) -> StartingModel:
    """Read the files of `train.model`.

    Raises UsageError or DataError if there is no such model or training does not support it, InfrastructureError if it
    cannot be fetched.
    """
    layout = read_layout(resolve_model(config.train.model, config.storage))
    static = config.train.encoder == "static"
    shapes = _tensor_shapes(layout.module)
    dense = [] if static else [shape for module in layout.dense for shape in _tensor_shapes(module.folder)]
    weights = sum(math.prod(shape) for shape in [*shapes, *dense])
    return StartingModel(weights, _dimensions(layout, shapes, static))


def check_starting_model(config: RunConfig) -> None:
    """Raise what `read_starting_model` raises, and UsageError if `train.matryoshka` does not fit the model."""
    model = read_starting_model(config)
    if model.dimensions is not None:
        check_matryoshka(config.train, model.dimensions)


def check_matryoshka(config: TrainConfig, dimensions: int) -> None:
    """Raise UsageError unless the largest of `train.matryoshka`'s sizes is that of the model's vectors."""
    if config.matryoshka is not None and max(config.matryoshka) != dimensions:
        raise UsageError(f"train.matryoshka: the largest size must be the model's, {dimensions}")


def default_learning_rate(config: TrainConfig, weights: int) -> float:
    """Return the peak learning rate if the configuration leaves it open; `weights` counts those of the model."""
    if config.encoder == "static":
        return _STATIC_RATE
    return next(rate for limit, rate in _BACKBONE_RATES if weights <= limit)


def with_learning_rate(config: RunConfig) -> RunConfig:
    """Return `config` with `train.learning_rate` filled in if it is unset."""
    train = config.train
    if train.learning_rate is not None:
        return config
    # A static encoder's rate does not depend on the model, which then need not be fetched for it.
    weights = 0 if train.encoder == "static" else read_starting_model(config).weights
    rate = default_learning_rate(train, weights)
    return config.model_copy(update={"train": train.model_copy(update={"learning_rate": rate})})


def _dimensions(layout: Layout, shapes: list[list[int]], static: bool) -> int | None:
    if layout.kind == "static":
        size = next((shape[1] for shape in shapes if len(shape) == 2), None)
    elif layout.dense and not static:
        size = layout.dense[-1].out_features
    else:
        model = read_config(layout.module)
        size = model.get("projection_dim") if layout.kind == "towers" else model.get("hidden_size")
        if isinstance(size, int) and not static:
            size *= len(layout.pooling.split("+"))
    return shorter(size, layout.truncate_dim) if isinstance(size, int) else None


def _tensor_shapes(folder: Path) -> list[list[int]]:
    """Return the shapes of all tensors in the safetensors files of `folder`, from the headers of the files."""
    shapes = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes += [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            raise DataError(f"{path}: not a safetensors file") from None
    return shapes
