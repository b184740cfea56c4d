"""`batches`: which rows stand together in a global batch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clusterbatch.config.base import Section, operational


class BatchesConfig(Section):
    # group: the user's own segments (corpus.columns.group), inside each source. random_groups: the control for
    # cluster, groups of the same sizes made of any rows of the source.
    stratify: Literal["random", "source", "cluster", "group", "random_groups"] = "cluster"
    # Pairs in one global batch, over all ranks.
    size: int = Field(256, ge=2)
    # Unset: derived for each source from its clusters' sizes, so that at most about a quarter of the rows is packed.
    clusters_per_batch: int | None = Field(None, ge=1)
    # Sources smaller than a batch: pooled with each other, or left out.
    small_sources: Literal["pool", "leave_out"] = "pool"
    # Multiplies how often a source's batches are drawn (1 for sources not named, 0 leaves a source out); an epoch is
    # then about as many batches as without. Unset: every row once an epoch.
    source_weights: dict[str, float] | None = None
    seed: int = 0
    # What a worker reads ahead, and what it keeps decoded where a strategy moves single rows.
    prefetch_bytes: int = operational(64 * 2**20, ge=2**16)
    cache_bytes: int = operational(256 * 2**20, ge=2**16)
