"""`cluster`: how the corpus is grouped, and how its shards are laid out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, operational


class ClusterConfig(Section):
    features: Literal["query", "document", "both"] = "document"
    scope: Literal["source", "corpus"] = "source"
    # Clusters per source (per corpus with scope: corpus); or give mean_size and let each source's rows decide.
    clusters: int | None = Field(None, ge=1)
    mean_size: int | None = Field(None, ge=1)
    seed: int = 0
    iterations: int = Field(20, ge=1)
    sample_per_centroid: int = Field(256, ge=1)
    run_rows: int = Field(64, ge=1)
    shard_bytes: int = Field(256 * 2**20, ge=2**16)
    workers: int = operational(2, ge=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> ClusterConfig:
        if self.clusters is not None and self.mean_size is not None:
            raise ValueError("give clusters or mean_size, not both")
        return self
