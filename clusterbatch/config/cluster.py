"""`cluster`: how the corpus is grouped, and how its shards are laid out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, added, operational


class ClusterConfig(Section):
    # kmeans: rows nearest one centroid. communities: equal groups of `mean_size` mutual neighbours, meant to be small;
    # each source is searched exactly, in time that grows with the square of its rows, and its graph is one worker's.
    method: Literal["kmeans", "communities"] = added("kmeans")
    # Of the documents in order of their score with a query, without those known to answer it: the ranks (from 0) whose
    # rows are the query's neighbours. The first ones are often answers that nobody judged.
    neighbour_ranks: tuple[int, int] = added((30, 130))
    # Vectors that are clustered. both: query and document side by side; both_orders: the fit also sees them swapped.
    features: Literal["query", "document", "both", "both_orders"] = "document"
    # Fewer dimensions to cluster in: by PCA fitted to the sample, or by a random projection. Unset: all.
    dimensions: int | None = Field(None, ge=2)
    reduction: Literal["pca", "random"] = "pca"
    # corpus: all sources are clustered as one, which is then called "(all)" in place of their names.
    scope: Literal["source", "corpus"] = "source"
    # Cluster by this column of the corpus (corpus.columns.group) instead of by vectors.
    column: Literal["group"] | None = None
    # Clusters per source (per corpus with scope: corpus), fewer where they would have less than 16 rows; or mean_size,
    # and each source's rows decide. Neither: four global batches of rows per cluster. Sources of less than one and a
    # half such clusters are not split.
    clusters: int | None = Field(None, ge=1)
    mean_size: int | None = Field(None, ge=1)
    # Larger clusters are split into equal parts, smaller ones merged with their nearest neighbour.
    max_size: int | None = Field(None, ge=2)
    min_size: int | None = Field(None, ge=2)
    # Clusters of about one size, at some cost in cosine.
    balanced: bool = False
    # 2: first into about sqrt(clusters) coarse clusters, then each of those. Unset: 2 above 4,096 clusters.
    levels: Literal[1, 2] | None = None
    seed: int = 0
    # Passes over the fit's sample, at most, and fits of which the best is kept.
    iterations: int = Field(4, ge=1)
    restarts: int = Field(1, ge=1)
    # Of each source at least 16,384 rows, or all.
    sample_per_centroid: int = Field(256, ge=8)
    # Of the fit's products; the assignment is always in float32. auto: bfloat16 where the hardware multiplies it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Share of each source's rows to leave out: those farthest from their centroid. They are kept aside.
    drop_outliers: float | None = Field(None, gt=0, le=0.5)
    # How the embedding model's vectors are kept for masks: as they are, in 8 bits, or not at all; and reduced to how
    # many dimensions.
    surrogate: Literal["float16", "int8", "none"] = "float16"
    surrogate_dimensions: int | None = Field(None, ge=8)
    run_rows: int = Field(64, ge=1)
    # Tokens and vectors in one shard, about.
    shard_bytes: int = Field(256 * 2**20, ge=2**16)
    workers: int = operational(2, ge=1)
    device: str = operational("auto")
    # What each worker asks of the cluster. GPUs unset: one; where there are fewer GPUs than workers, they share them.
    cpus_per_worker: float = operational(0.9, gt=0)
    gpus_per_worker: float | None = operational(None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.clusters is not None and self.mean_size is not None:
            raise ValueError("give clusters or mean_size, not both")
        if self.column is not None and self.clusters is not None:
            raise ValueError("give clusters or column, not both")
        if self.min_size and self.max_size and 2 * self.min_size > self.max_size:
            raise ValueError("max_size must be at least twice min_size")
        first, last = self.neighbour_ranks
        if not 0 <= first < last:
            raise ValueError(f"neighbour_ranks: expected [first, last) with 0 <= first < last (got {[first, last]})")
        if self.method == "communities":
            for key in ("column", "levels", "dimensions", "balanced"):
                if getattr(self, key):
                    raise ValueError(f"method: communities has no use for {key}")
        return self
