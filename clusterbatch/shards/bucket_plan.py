"""Plan of the shuffle's buckets: contiguous ranges of clusters in packing order, about one shard each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BucketPlan:
    """C clusters, numbered through all P partitions.

    first_cluster: (P + 1,) the first cluster of each partition; first: (C,) the first bucket of each cluster; pieces:
    (C,) how many it is spread over. A cluster larger than a shard has buckets of its own, one per range of hashes; all
    others share a bucket with their neighbours. After the clusters' buckets come those of outliers.
    """

    first_cluster: np.ndarray
    first: np.ndarray
    pieces: np.ndarray
    outlier_buckets: int = 0

    @property
    def cluster_buckets(self) -> int:
        return int(self.first[-1] + self.pieces[-1])

    @property
    def buckets(self) -> int:
        return self.cluster_buckets + self.outlier_buckets

    def of_rows(self, cluster: np.ndarray, hashes: np.ndarray, outlier: np.ndarray) -> np.ndarray:
        """Return (rows,) int64 buckets, by each row's cluster and the hash that orders it there."""
        bucket = self.first[cluster] + _range(hashes, self.pieces[cluster])
        if self.outlier_buckets:
            aside = self.cluster_buckets + _range(hashes, np.full(len(hashes), self.outlier_buckets))
            bucket = np.where(outlier, aside, bucket)
        return bucket

    def partition_of(self, cluster: np.ndarray) -> np.ndarray:
        """Return the partition of each cluster."""
        return np.searchsorted(self.first_cluster, cluster, side="right") - 1


def plan_buckets(cluster_bytes: Sequence[np.ndarray], shard_bytes: int, outlier_share: float = 0.0) -> BucketPlan:
    """Plan buckets for estimated bytes of the clusters, one (clusters,) array for each partition, in packing order.

    Small partitions share buckets with their neighbours. outlier_share: of all rows, about.
    """
    sizes = np.concatenate(cluster_bytes)
    first_cluster = np.concatenate([[0], np.cumsum([len(partition) for partition in cluster_bytes])])
    pieces = np.maximum(1, np.ceil(sizes / (1.25 * shard_bytes))).astype(np.int64)
    first = np.empty(len(sizes), np.int64)
    bucket, members, filled = 0, 0, 0.0
    for cluster, (size, parts) in enumerate(zip(sizes.tolist(), pieces.tolist(), strict=True)):
        if members and (parts > 1 or filled + size > 1.25 * shard_bytes):
            bucket, members, filled = bucket + 1, 0, 0.0
        first[cluster] = bucket
        if parts > 1:
            bucket += parts
        else:
            members, filled = members + 1, filled + size
    outlier_buckets = int(np.ceil(outlier_share * sizes.sum() / shard_bytes))
    return BucketPlan(first_cluster, first, pieces, outlier_buckets)


def _range(hashes: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return (rows,) int64 in [0, parts): which of `parts` equal ranges of hashes each hash is in."""
    # The top 32 bits suffice, and their product with a number of parts does not overflow.
    return ((hashes >> np.uint64(32)) * parts.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
