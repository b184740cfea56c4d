"""Which rows meet in the shuffle: contiguous ranges of clusters in packing order, about one shard each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BucketPlan:
    """first: (C,) int64, the (first) bucket of each cluster; pieces: (C,) int64, how many it is spread over.

    Clusters are numbered through all groups. A cluster larger than a shard has buckets of its own, one per range of
    hashes; all others share a bucket with their neighbours.
    """

    first: np.ndarray
    pieces: np.ndarray
    buckets: int

    def of_rows(self, cluster: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """(rows,) int64: the bucket of each row, by its cluster and the hash that orders it there."""
        # The top 32 bits suffice: hash * pieces / 2^32 without overflow.
        position = (hashes >> np.uint64(32)) * self.pieces[cluster].astype(np.uint64) >> np.uint64(32)
        return self.first[cluster] + position.astype(np.int64)


def plan_buckets(cluster_bytes: np.ndarray, shard_bytes: int) -> BucketPlan:
    """From estimated bytes of each cluster, (C,) in packing order. Small groups share buckets with their neighbours."""
    pieces = np.maximum(1, np.ceil(cluster_bytes / (1.25 * shard_bytes))).astype(np.int64)
    first = np.empty(len(cluster_bytes), np.int64)
    bucket, filled = 0, 0.0
    for cluster, (size, parts) in enumerate(zip(cluster_bytes.tolist(), pieces.tolist(), strict=True)):
        if filled and (parts > 1 or filled + size > 1.25 * shard_bytes):
            bucket, filled = bucket + 1, 0.0
        first[cluster] = bucket
        if parts > 1:
            bucket += parts
        else:
            filled += size
    return BucketPlan(first, pieces, int(first[-1] + pieces[-1]))
