"""The models that an evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clusterbatch.config import RunConfig
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.store.workspace import Workspace

BEFORE = "before"
AFTER = "after"


@dataclass(frozen=True)
class EvaluatedModel:
    """`label` as tables show it, `name` as `encoder.resolve` takes it, `version` identifies its weights."""

    label: str
    name: str
    encoder: Literal["static", "backbone"]
    version: str


def evaluated_models(config: RunConfig, generation: int) -> list[EvaluatedModel]:
    """The model as training starts from it, and the trained one. Raises DataError where none has been trained."""
    workspace = Workspace(config)
    trained = workspace.train(generation).require()
    kind = config.train.encoder
    return [
        EvaluatedModel(BEFORE, config.train.model, kind, _version(config.train.model, config)),
        EvaluatedModel(AFTER, workspace.model.uri, kind, trained.fingerprint),
    ]


def identities(models: Sequence[EvaluatedModel]) -> list[list[str]]:
    """What a fingerprint needs to know of them: their weights, not their place."""
    return [[model.label, model.version, model.encoder] for model in models]


def _version(name: str, config: RunConfig) -> str:
    return model_fingerprint(resolve_model(name, config.storage))
