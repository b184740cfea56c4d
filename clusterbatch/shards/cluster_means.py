"""Mean vectors of finished clusters, under the numbers of the cluster index.

The fit's centroids are numbered otherwise: clusters are renumbered in packing order, split by `cluster.max_size` and
joined by `cluster.min_size`, and a fit of two levels starts from 0 in every coarse cluster.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import ClusterConfig
from clusterbatch.embedding.vectors import Side, vector_column, vector_values
from clusterbatch.shards.layout import ShardSchema, VectorEncoder
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store import Artifact
from clusterbatch.store.details import ClustersDetails, details_of

# Rows of each cluster that are averaged: inside a cluster rows are in random order.
_ROWS = 64


@dataclass(frozen=True)
class ClusterMeans:
    """names: (source, cluster) of the index; vectors: (k, D) float32 unit means, D as stored in the shards."""

    names: list[tuple[str, int]]
    vectors: np.ndarray

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """Return the row of the nearest mean, (n,) int64, for (n, D) vectors; in blocks, for bounded memory."""
        block = max(1, 2**24 // max(1, len(self.names)))
        found = [
            np.argmax(vectors[start : start + block].astype(np.float32) @ self.vectors.T, axis=1)
            for start in range(0, len(vectors), block)
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)


def clustered_side(config: ClusterConfig) -> Side:
    """Return the side whose vectors stand for a cluster: that of the features, the query's if both are clustered."""
    return "document" if config.features == "document" else "query"


def cluster_means(
    artifact: Artifact, config: ClusterConfig, only: Collection[tuple[str, int]] | None = None
) -> ClusterMeans | None:
    """Estimate the mean vector of each cluster from its first rows, read by byte range.

    only: (source, cluster) to read; None: all. Returns None if the shards keep no vectors.
    """
    reader = ShardReader(artifact)
    if ShardSchema(**details_of(artifact.require(), ClustersDetails)["layout"]).vectors is None:
        return None
    index, side = reader.index, clustered_side(config)
    # The first piece of each cluster: pieces of one cluster follow each other.
    keys = np.stack([index.source, index.cluster], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    found: dict[tuple[str, int], np.ndarray] = {}
    for piece in np.sort(first).tolist():
        name = (index.sources[index.source[piece]], int(index.cluster[piece]))
        if only is not None and name not in only:
            continue
        runs = min(-(-_ROWS // index.run_rows), -(-int(index.rows[piece]) // index.run_rows))
        wanted = np.arange(runs) + index.first_run[piece]
        batches = reader.read_runs(int(index.shard[piece]), wanted, vectors=True)
        vectors = np.concatenate([vector_values(batch.column(f"{side}_vector")) for batch in batches])
        found[name] = unit_length(vectors.mean(axis=0, dtype=np.float64))
    if not found:
        return None
    return ClusterMeans(list(found), np.stack(list(found.values())).astype(np.float32))


def as_stored(vectors: np.ndarray, artifact: Artifact, config: ClusterConfig) -> np.ndarray:
    """Return (n, D) vectors of the embedding model as shards would store and decode them, (n, d) float32."""
    stored_as = ShardSchema(**details_of(artifact.require(), ClustersDetails)["layout"]).vectors
    assert stored_as is not None, "no vectors are stored"
    column = vector_column(vectors)
    stored = VectorEncoder(stored_as, config.seed).encode(pa.table({"query_vector": column, "document_vector": column}))
    return vector_values(stored_as.decode(stored)[0]).astype(np.float32)
