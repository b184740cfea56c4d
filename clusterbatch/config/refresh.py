"""`refresh`: the next generation, and when it is worth making and keeping."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from clusterbatch.config.base import ModelName, Section

# Figures of the drift on a sample that `refresh.when` can ask for.
DRIFT_FIGURES = ("drift", "movement", "hardness")


class RefreshConfig(Section):
    """Each round re-embeds, re-clusters and goes on training from the live model's last checkpoint."""

    # Generations that one call makes.
    rounds: int = Field(1, ge=1)
    # Optimizer steps of a round, with train.schedule over them; unset: one epoch of its batches.
    every_steps: int | None = Field(None, ge=1)
    # What embeds the corpus anew. Unset: the live model; else a fixed one, by name or folder.
    surrogate: ModelName | None = None
    # New clusters are built while a round trains, for the first round that begins after they are whole; a round never
    # waits. Training and building then share the cluster: see cpus_per_worker of the stages.
    asynchronous: bool = False
    # Share of the rows, drawn anew in every round, that stay where the generation before put them: all batches changing
    # at once can make a model forget (ANCE-Tele, Sun 2022).
    keep_fraction: float = Field(0.0, ge=0, lt=1)
    # always, never (goes on training with the old clusters: the control), or a figure of the sample and what it must
    # exceed: drift > 0.1 (share of rows that change clusters, beyond chance), movement, hardness.
    when: str = "always"
    # Rows that drift is measured on, at least; 32 of each cluster where that is more.
    sample: int = Field(16_384, ge=256)
    # A round's model goes live when its metric, averaged over the collections, is no more than `margin` below that of
    # the live one, and of the best that went before it: small losses do not add up.
    metric: str = "NDCG@10"
    margin: float = Field(0.005, ge=0)
    # Documents that are indexed with the live model elsewhere, whose re-indexing a promotion costs; unset: the corpus'.
    production_documents: int | None = Field(None, ge=0)

    @field_validator("when")
    @classmethod
    def _known(cls, when: str) -> str:
        if when not in ("always", "never") and _condition(when) is None:
            raise ValueError(f"expected always, never, or one of {', '.join(DRIFT_FIGURES)} and '> number'")
        return when

    def wants_clusters(self, figures: dict[str, Any]) -> bool:
        """Whether a round with these figures of drift clusters anew."""
        condition = _condition(self.when)
        if condition is None:
            return self.when == "always"
        name, limit = condition
        return float(figures[name]) > limit


def _condition(when: str) -> tuple[str, float] | None:
    match = re.fullmatch(rf"\s*({'|'.join(DRIFT_FIGURES)})\s*>\s*(-?\d*\.?\d+)\s*", when)
    return (match[1], float(match[2])) if match else None
