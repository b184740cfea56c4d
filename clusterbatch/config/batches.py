"""`batches`: which rows stand together in a global batch, and how that changes while training goes on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, operational

# group: the user's own segments (corpus.columns.group), inside each source. random_groups: the control for cluster,
# groups of the same sizes made of any rows of the source.
Stratify = Literal["random", "source", "cluster", "group", "random_groups"]


class PhaseConfig(Section):
    """A stretch of the curriculum; keys that are not set are those of `batches`.

    It lasts so many epochs or steps; the last phase, and only that, may leave both open and lasts to the end.
    """

    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    stratify: Stratify | None = None
    clusters_per_batch: int | None = Field(None, ge=1)
    merged_clusters: int | None = Field(None, ge=1)
    random_share: float | None = Field(None, ge=0, le=0.5)

    @model_validator(mode="after")
    def _consistent(self) -> PhaseConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of `batches` that it sets."""
        return self.model_dump(exclude={"epochs", "steps"}, exclude_none=True)


class BatchesConfig(Section):
    stratify: Stratify = "cluster"
    # Pairs in one global batch, over all ranks.
    size: int = Field(256, ge=2)
    # Unset: derived for each source from its clusters' sizes, so that at most about a quarter of the rows is packed.
    clusters_per_batch: int | None = Field(None, ge=1)
    # So many neighbouring clusters count as one: coarser clusters without clustering again.
    merged_clusters: int = Field(1, ge=1)
    # Share of each batch that is exchanged for rows of any other batches of its source.
    random_share: float = Field(0.0, ge=0, le=0.5)
    # Each cluster as often as any other, however many rows it has (TAS, Hofstaetter 2021). Unset: by its rows.
    uniform_clusters: bool = False
    # Phases one after the other, for instance from easy batches to hard ones. Unset: the same from the first step on.
    curriculum: list[PhaseConfig] = []
    # Sources smaller than a batch: pooled with each other, or left out (then their rows are never trained on).
    small_sources: Literal["pool", "leave_out"] = "pool"
    # Multiplies how often a source's batches are drawn (1 for sources not named, 0 leaves a source out); an epoch is
    # then about as many batches as without. Unset: every row once an epoch.
    source_weights: dict[str, float] | None = None
    seed: int = 0
    # What a worker reads ahead, and what it keeps decoded where a strategy moves single rows.
    prefetch_bytes: int = operational(64 * 2**20, ge=2**16)
    cache_bytes: int = operational(256 * 2**20, ge=2**16)

    @model_validator(mode="after")
    def _by_cluster(self) -> BatchesConfig:
        if self.uniform_clusters and any(phase.stratify != "cluster" for phase in self.phases):
            raise ValueError("uniform_clusters needs stratify: cluster, in all phases")
        return self

    @model_validator(mode="after")
    def _open_end(self) -> BatchesConfig:
        for number, phase in enumerate(self.curriculum[:-1]):
            if phase.epochs is None and phase.steps is None:
                raise ValueError(f"curriculum: phase {number + 1} must say how many epochs or steps it lasts")
        if self.curriculum and (self.curriculum[-1].epochs or self.curriculum[-1].steps):
            raise ValueError("curriculum: the last phase lasts to the end; give it neither epochs nor steps")
        return self

    @property
    def phases(self) -> list[BatchesConfig]:
        """The batches of each phase, without a curriculum of their own; one where there is none."""
        return [
            self.model_copy(update={"curriculum": [], **phase.changes}) for phase in self.curriculum or [PhaseConfig()]
        ]
