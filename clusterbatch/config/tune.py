"""`tune`: which settings to try, and how long."""

from __future__ import annotations

from itertools import product
from typing import Any

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, operational

_SECTIONS = ("batches", "cluster", "mine", "train")
_MOST_CANDIDATES = 256


class TuneConfig(Section):
    # Values to try, by dotted key of batches, cluster, mine or train; every combination is a candidate.
    candidates: dict[str, list[Any]] = {
        "cluster.mean_size": [512, 1024, 2048, 4096],
        "cluster.features": ["document", "query"],
        "train.mask.surrogate_margin": [None, -0.05],
    }
    # Candidates that are trained at all: the best of a cheap ranking by a sample's vectors. The others are only ranked.
    keep: int = Field(6, ge=2)
    # Successive halving: each rung trains `reduction` times the steps of the one before, with 1 / `reduction` of its
    # candidates; the last rung trains `steps`. Unset: what train.steps or train.epochs say.
    steps: int | None = Field(None, ge=1)
    reduction: int = Field(3, ge=2)
    rungs: int = Field(2, ge=1)
    seeds: int = Field(1, ge=1)
    metric: str = "NDCG@10"
    workers: int = operational(2, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TuneConfig:
        for key, values in self.candidates.items():
            if key.split(".")[0] not in _SECTIONS:
                raise ValueError(f"candidates: {key} cannot be tuned (only {', '.join(_SECTIONS)})")
            if not values:
                raise ValueError(f"candidates: {key} has no values")
        if not 2 <= len(self.combinations) <= _MOST_CANDIDATES:
            raise ValueError(f"candidates: {len(self.combinations)} combinations, expected 2 to {_MOST_CANDIDATES}")
        return self

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """The candidates, as changes of the configuration."""
        return [dict(zip(self.candidates, values, strict=True)) for values in product(*self.candidates.values())]
