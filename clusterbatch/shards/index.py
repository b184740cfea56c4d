"""Cluster index: maps clusters to rows and storage locations. All that a batch plan needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

# Pieces with less crowding than this are taken to have none: ordinary corpora then have indexes without that column.
LEAST_CROWDING = 0.1


def repeated_share(hashes: np.ndarray) -> float:
    """Return the probability that two different rows have the same hash; hashes: (n,) of any integer type."""
    rows = len(hashes)
    counts = np.unique(hashes, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / (rows * (rows - 1))) if rows > 1 else 0.0


@dataclass(frozen=True)
class ClusterIndex:
    """One entry per piece of a cluster (a cluster larger than a shard has several), in packing order by source.

    Arrays are (pieces,). `source` numbers `sources`, and pieces of one source are consecutive. Runs are `run_rows`
    consecutive rows of a piece; only its last run may be shorter. fingerprint: of the clusters artifact.

    Raises ValueError if pieces of a source are not consecutive or one has no rows.
    """

    sources: list[str]
    source: np.ndarray  # int32
    cluster: np.ndarray  # int32, number inside the source
    rows: np.ndarray  # int64
    shard: np.ndarray  # int32
    first_run: np.ndarray  # int64, inside the shard
    first_row: np.ndarray  # int64, inside the shard
    run_rows: int
    fingerprint: str
    mean_cosine: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    # float32, the probability that two rows of a piece have the same query, or the same document, whichever is larger;
    # empty if it is small in all pieces, or not known.
    crowding: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def __post_init__(self) -> None:
        if np.any(np.diff(self.source) < 0):
            raise ValueError("cluster index: pieces of one source must be consecutive")
        if len(self.rows) and self.rows.min() < 1:
            raise ValueError("cluster index: a piece without rows")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total_rows(self) -> int:
        return int(self.rows.sum())

    @staticmethod
    def from_table(table: pa.Table, run_rows: int, fingerprint: str) -> ClusterIndex:
        """Return the index of a table of schema.CLUSTER_INDEX, in its order."""
        encoded = table["source"].combine_chunks().dictionary_encode()
        # Numbered by first appearance: then consecutive pieces give ascending numbers.
        return ClusterIndex(
            sources=encoded.dictionary.to_pylist(),
            source=encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32),
            cluster=table["cluster"].to_numpy(),
            rows=table["rows"].to_numpy(),
            shard=table["shard"].to_numpy(),
            first_run=table["first_run"].to_numpy(),
            first_row=table["first_row"].to_numpy(),
            run_rows=run_rows,
            fingerprint=fingerprint,
            mean_cosine=table["mean_cosine"].to_numpy(),
            crowding=table["crowding"].to_numpy() if "crowding" in table.column_names else np.empty(0, np.float32),
        )
