"""The models that an evaluation measures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clusterbatch.config import RunConfig
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.store import Folder
from clusterbatch.store.workspace import Workspace

BEFORE = "before"
AFTER = "after"
BM25 = "bm25"


@dataclass(frozen=True)
class EvaluatedModel:
    """`label` as tables show it, `name` as `encoder.resolve` takes it, `version` identifies its weights.

    encoder: None takes what the folder holds. BM25 has no weights: its name is empty.
    """

    label: str
    name: str
    encoder: Literal["static", "backbone"] | None
    version: str

    @property
    def is_lexical(self) -> bool:
        return not self.name


def evaluated_models(config: RunConfig, generation: int) -> list[EvaluatedModel]:
    """The models of `evaluate.models`, in its order.

    Raises DataError where `after` is asked for and nothing has been trained, UsageError where a model is not found.
    """
    models = [_model(name, config, generation) for name in config.evaluate.models]
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        raise UsageError(f"evaluate.models: {max(labels, key=labels.count)} stands there twice")
    return models


def identities(models: Sequence[EvaluatedModel]) -> list[list[str | None]]:
    """What a fingerprint needs to know of them: their weights, not their place."""
    return [[model.label, model.version, model.encoder] for model in models]


def _model(name: str, config: RunConfig, generation: int) -> EvaluatedModel:
    workspace, kind = Workspace(config), config.train.encoder
    if name == BM25:
        return EvaluatedModel(BM25, "", None, "")
    if name == BEFORE:
        return EvaluatedModel(BEFORE, config.train.model, kind, _version(config.train.model, config))
    if name == AFTER:
        trained = workspace.train(generation).require()
        # Its own, for which model is live is decided by what this finds.
        return EvaluatedModel(AFTER, workspace.trained_model(generation).uri, kind, trained.fingerprint)
    folder = Folder(name, config.storage) if "://" in name or name.startswith((".", "/", "~")) else None
    place = name
    if folder is not None and folder.exists("model/modules.json"):
        place = folder.child("model").uri
    label = name.rstrip("/").rsplit("/", 1)[-1]
    return EvaluatedModel(label, place, None, _version(place, config))


def _version(name: str, config: RunConfig) -> str:
    return model_fingerprint(resolve_model(name, config.storage))
