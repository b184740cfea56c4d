"""Cluster indexes without shards, for tests of the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.strata import POOL
from clusterbatch.shards.index import ClusterIndex


def make_index(sizes: Sequence[Sequence[int]], run_rows: int = 8, pieces: int = 1) -> ClusterIndex:
    """`sizes[s]` are the rows of the clusters of source s; all lie one after the other in one shard.

    Each cluster is cut into (up to) `pieces` pieces of about equal size.
    """
    cut = [
        (source, cluster, len(part))
        for source, clusters in enumerate(sizes)
        for cluster, size in enumerate(clusters)
        for part in np.array_split(np.arange(size), min(pieces, size))
    ]
    source, cluster, rows = np.array(cut, np.int64).T
    runs = -(-rows // run_rows)
    return ClusterIndex(
        sources=[f"source-{number}" for number in range(len(sizes))],
        source=source.astype(np.int32),
        cluster=cluster.astype(np.int32),
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


def check_epoch(plan: BatchPlan, epoch: int) -> None:
    """Assert what every plan without weights promises of an epoch: each row once, but for counted repeats."""
    index, size = plan.index, plan.config.size
    seen = np.zeros(index.total_rows, int)
    repeats: Counter[str] = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        batch = plan.batch(step)
        assert (len(batch), batch.step, batch.epoch) == (size, step, epoch)
        assert np.all((batch.row >= 0) & (batch.row < index.rows[batch.piece]))
        rows = row_ids(index, batch.piece, batch.row)
        assert len(np.unique(rows)) == size, "a row twice in one batch"
        assert 0 <= batch.repeated < size
        seen[rows] += 1
        repeats[batch.stratum.name] += batch.repeated
        if plan.config.stratify != "random" and batch.stratum.name != POOL:
            assert len(np.unique(index.source[batch.piece])) == 1, "a batch of two sources"
    assert seen.min() == 1, "a row was left out"
    assert (seen - 1).sum() == sum(repeats.values())
    assert max(repeats.values()) < size
