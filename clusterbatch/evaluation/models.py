"""The models that an evaluation measures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from clusterbatch.config import RunConfig
from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.encoder.limits import check_limits, evaluation_limits
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import model_fingerprint, model_place, resolve_model
from clusterbatch.errors import UsageError, about
from clusterbatch.store.workspace import Workspace

BEFORE = "before"
AFTER = "after"
BM25 = "bm25"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure: `label` for tables, `name` for `encoder.resolve`, `version` identifies its weights.

    encoder: None takes what the folder holds. BM25 has no weights: its name is empty. prompts: (name, prompt), in place
    of those of the model's own files.
    """

    label: str
    name: str
    encoder: Literal["static", "backbone"] | None
    version: str
    prompts: tuple[tuple[str, str], ...] = ()

    @property
    def is_lexical(self) -> bool:
        return not self.name


def evaluated_models(config: RunConfig, generation: int, trained: str | None = None) -> list[EvaluatedModel]:
    """Return the models of `evaluate.models`, in its order.

    trained: the fingerprint of a training that may not have finished yet; None takes that of the finished one.

    Raises DataError if `after` is asked for and nothing has been trained, UsageError if a model is not found.
    """
    models = [_model(name, config, generation, trained) for name in config.evaluate.models]
    labels = [*(model.label for model in models), *({BEFORE, AFTER, BM25} - {*config.evaluate.models})]
    # Many models are in folders of the same name, or of the name of one that is none; their parents tell them apart.
    models = [
        replace(model, label="/".join(name.rstrip("/").rsplit("/", 2)[-2:])) if labels.count(model.label) > 1 else model
        for name, model in zip(config.evaluate.models, models, strict=True)
    ]
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        raise UsageError(f"evaluate.models: {max(labels, key=labels.count)} stands there twice")
    return models


def identities(models: Sequence[EvaluatedModel]) -> list[list[Any]]:
    """Return what a fingerprint needs of them: their weights, not their place."""
    return [
        [model.label, model.version, model.encoder, *([dict(model.prompts)] if model.prompts else [])]
        for model in models
    ]


def measuring_dtype(config: RunConfig, encoder: Encoder) -> torch.dtype:
    """Return the type in which an encoder on its device is measured; static encoders add up in float32."""
    of_backbone = encoder.kind != "static"
    return inference_dtype(config.evaluate.dtype, encoder.device) if of_backbone else torch.float32


def check_room(models: Sequence[EvaluatedModel], config: RunConfig) -> None:
    """Raise UsageError if a model's prompt or special tokens leave no room for text within a limit of `evaluate`."""
    for model in models:
        if not model.is_lexical:
            with about(f"evaluate.models: {model.label}"):
                limits = evaluation_limits(config, dict(model.prompts))
                check_limits(model.name, config.storage, limits, model.encoder)


def load(model: EvaluatedModel, config: RunConfig) -> Encoder:
    """Load a model for measuring: in the type of `evaluate.dtype`, without padding if its architecture allows it."""
    folder = resolve_model(model.name, config.storage)
    device = resolve_device(config.evaluate.device)
    dtype = inference_dtype(config.evaluate.dtype, device)
    encoder = load_encoder(folder, model.encoder, dtype=dtype, device=device, packed=True)
    encoder.prompts.update(model.prompts)
    return encoder


def _model(name: str, config: RunConfig, generation: int, trained: str | None) -> EvaluatedModel:
    workspace, kind = Workspace(config), config.train.encoder
    if name == BM25:
        return EvaluatedModel(BM25, "", None, "")
    if name == BEFORE:
        # Before and after differ by the training alone, not by what the model is given. Prompts of single sources are
        # saved with the trained model, but no evaluation uses them.
        prompts = tuple(config.train.prompts.model_dump(exclude_none=True).items())
        return EvaluatedModel(BEFORE, config.train.model, kind, _version(config.train.model, config), prompts)
    if name == AFTER:
        version = trained or workspace.train(generation).require().fingerprint
        # Its own model, as this evaluation decides which model goes live.
        return EvaluatedModel(AFTER, workspace.trained_model(generation).uri, kind, version)
    folder = model_place(name, config.storage)
    # Absolute: workers have other working directories.
    place = name if folder is None else folder.uri
    label = name.rstrip("/").rsplit("/", 1)[-1]
    return EvaluatedModel(label, place, None, _version(place, config))


def _version(name: str, config: RunConfig) -> str:
    return model_fingerprint(resolve_model(name, config.storage))
