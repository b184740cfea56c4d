"""Section `batches`: which rows share a global batch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, Seed, added, operational

# group: the user's own segments (corpus.columns.group), inside each source. random_groups: the control for cluster,
# groups of the same sizes made of any rows of the source.
Stratify = Literal["random", "source", "cluster", "group", "random_groups"]


class PhaseConfig(Section):
    """A stretch of the curriculum; keys that are not set are those of `batches`.

    Its length is given in epochs or steps, except for the last phase, which lasts to the end.
    """

    epochs: int | None = Field(None, ge=1)
    """Length of the phase in epochs."""
    steps: int | None = Field(None, ge=1)
    """Length of the phase in steps."""
    stratify: Stratify | None = None
    """As in `batches`."""
    clusters_per_batch: int | None = Field(None, ge=1)
    """As in `batches`."""
    merged_clusters: int | None = Field(None, ge=1)
    """As in `batches`."""
    random_share: float | None = Field(None, ge=0, le=0.5)
    """As in `batches`."""
    super_batch: int | None = added(None, ge=1)
    """As in `batches`."""

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
    """The rows of each global batch, and the order of batches."""

    stratify: Stratify = "cluster"
    """Rows that share a batch: any (`random`), those of one source, of one cluster of a source, of one user segment
    (`corpus.columns.group`) of a source, or of random groups of a source with the sizes of its clusters
    (`random_groups`, the control for `cluster`)."""
    size: int = Field(256, ge=2)
    """Pairs in one global batch, over all ranks."""
    clusters_per_batch: int | None = Field(None, ge=1)
    """Clusters of one source that share a batch. Unset: derived for each source from the sizes of its clusters, so
    that at most about a quarter of the rows is packed with neighbouring clusters."""
    merged_clusters: int = Field(1, ge=1)
    """Neighbouring clusters that count as one: coarser clusters without clustering again."""
    random_share: float = Field(0.0, ge=0, le=0.5)
    """Share of each batch that is exchanged for rows of other batches of the same source."""
    super_batch: int = added(1, ge=1)
    """Batches that are drawn together and then divided so that near rows share a batch, by the surrogate's vectors
    (`cluster.surrogate`). Needs `stratify: source` or `random`; every worker reads the vectors of them all. 1: off."""
    uniform_clusters: bool = False
    """Draw each cluster equally often (TAS, Hofstaetter 2021) instead of in proportion to its rows."""
    curriculum: list[PhaseConfig] = []
    """Phases one after the other, for example from easy to hard batches. Unset: one phase."""
    small_sources: Literal["pool", "leave_out"] = "pool"
    """Treatment of sources smaller than a batch: `pool` them with each other, or `leave_out` (their rows are then
    never trained on)."""
    source_weights: dict[str, float] | None = None
    """Factors on how often a source's batches are drawn: 1 for sources not named, 0 leaves a source out. An epoch
    keeps about its number of batches. Unset: every row once an epoch."""
    seed: Seed = 0
    """Seed of the order of batches and blocks."""
    prefetch_bytes: int = operational(64 * 2**20, ge=2**16)
    """Bytes that a worker reads ahead."""
    cache_bytes: int = operational(256 * 2**20, ge=2**16)
    """Bytes that a worker keeps decoded when a strategy moves single rows."""

    @model_validator(mode="after")
    def _by_cluster(self) -> BatchesConfig:
        if self.uniform_clusters and any(phase.stratify != "cluster" for phase in self.phases):
            raise ValueError("uniform_clusters needs stratify: cluster, in all phases")
        return self

    @model_validator(mode="after")
    def _super_batches(self) -> BatchesConfig:
        for phase in self.phases:
            if phase.super_batch == 1:
                continue
            if phase.stratify not in ("source", "random"):
                raise ValueError(f"super_batch needs stratify: source or random (got {phase.stratify})")
            if phase.random_share:
                raise ValueError("super_batch: its batches exchange no rows (random_share)")
        if self.largest_super_batch > 1 and self.source_weights:
            raise ValueError("super_batch: its batches have no weights (source_weights)")
        return self

    @model_validator(mode="after")
    def _parts(self) -> BatchesConfig:
        for phase in self.phases:
            if phase.clusters_per_batch and self.size % phase.clusters_per_batch:
                raise ValueError(f"clusters_per_batch: {phase.clusters_per_batch} does not divide size {self.size}")
        return self

    @model_validator(mode="after")
    def _weights(self) -> BatchesConfig:
        for name, weight in (self.source_weights or {}).items():
            if weight < 0:
                raise ValueError(f"source_weights.{name}: must be 0 or more (got {weight})")
        if self.source_weights and any(phase.stratify == "random" for phase in self.phases):
            raise ValueError("source_weights: with stratify: random there are no batches of one source to weight")
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
        """The batches of each phase, without a curriculum of their own; one if there is none."""
        return [
            self.model_copy(update={"curriculum": [], **phase.changes}) for phase in self.curriculum or [PhaseConfig()]
        ]

    @property
    def largest_super_batch(self) -> int:
        """The largest `super_batch` of all phases; 1 if none divides super-batches."""
        return max(phase.super_batch for phase in self.phases)
