"""Cluster indexes without shards, for tests of the plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clusterbatch.clustering.index import ClusterIndex


def make_index(sizes: Sequence[Sequence[int]], run_rows: int = 8) -> ClusterIndex:
    """`sizes[s]` are the rows of the clusters of source s; all lie one after the other in one shard."""
    rows = np.array([size for clusters in sizes for size in clusters], np.int64)
    runs = -(-rows // run_rows)
    return ClusterIndex(
        sources=[f"source-{number}" for number in range(len(sizes))],
        source=np.repeat(np.arange(len(sizes), dtype=np.int32), [len(clusters) for clusters in sizes]),
        cluster=np.concatenate([np.arange(len(clusters), dtype=np.int32) for clusters in sizes]),
        rows=rows,
        shard=np.zeros(len(rows), np.int32),
        first_run=np.concatenate([[0], np.cumsum(runs)[:-1]]),
        first_row=np.concatenate([[0], np.cumsum(rows)[:-1]]),
        run_rows=run_rows,
        fingerprint="test",
    )


def row_ids(index: ClusterIndex, piece: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One number per row of the whole corpus."""
    return index.first_row[piece] + row
