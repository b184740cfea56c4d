"""Cluster index: maps clusters to rows and storage locations. All that a batch plan needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.partitions import WHOLE_CORPUS
from clusterbatch.errors import UsageError

# Pieces with less crowding than this are taken to have none: ordinary corpora then have indexes without that column.
LEAST_CROWDING = 0.1


def repeated_share(hashes: np.ndarray) -> float:
    """Return the probability that two different rows have the same hash; hashes: (n,) of any integer type."""
    rows = len(hashes)
    counts = np.unique(hashes, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / (rows * (rows - 1))) if rows > 1 else 0.0


# Rows of a group of semantic duplicates that batches keep apart; those beyond share the last layer.
LAYERS = 8

# Bits, and bytes, of one entry of the table below.
_BLOCK, _BLOCK_BYTES = 256, 32
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


@dataclass(frozen=True)
class KeptRows:
    """The rows of pieces that were not left out, one bit for each row and an integer for 256 of them.

    bits: (blocks, 32) uint8, the rows of all pieces one after the other, each piece from the beginning of a byte;
    before: (blocks + 1,) kept rows before each block; first, first_kept: (pieces,) each piece's first bit among all
    bits and its first row among those kept.
    """

    bits: np.ndarray
    before: np.ndarray
    first: np.ndarray
    first_kept: np.ndarray

    @staticmethod
    def of(kept: Iterable[tuple[int, np.ndarray]], rows: np.ndarray) -> KeptRows:
        """kept: the number of each piece, in any order, and which of its rows are kept, bool; rows: (pieces,)."""
        piece_bytes = -(-rows // 8)
        first = np.cumsum(piece_bytes) - piece_bytes
        bits = np.zeros(-(-int(piece_bytes.sum()) // _BLOCK_BYTES) * _BLOCK_BYTES, np.uint8)
        counts = np.zeros(len(rows), np.int64)
        for piece, of_piece in kept:
            bits[first[piece] : first[piece] + piece_bytes[piece]] = np.packbits(of_piece)
            counts[piece] = np.count_nonzero(of_piece)
        blocks = bits.reshape(-1, _BLOCK_BYTES)
        before = np.concatenate([[0], np.cumsum(_BITS_SET[blocks].sum(1, dtype=np.int64))])
        return KeptRows(blocks, before, 8 * first, np.cumsum(counts) - counts)

    def take(self, pieces: np.ndarray) -> KeptRows:
        """Return the same of some of the pieces."""
        return replace(self, first=self.first[pieces], first_kept=self.first_kept[pieces])

    def rows(self, piece: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the (n,) rows inside their pieces that are the `row`-th kept ones there."""
        wanted = self.first_kept[piece] + row
        block = np.searchsorted(self.before, wanted, side="right") - 1
        so_far = np.cumsum(np.unpackbits(self.bits[block], axis=1), axis=1, dtype=np.uint16)
        # The first place at which that many are reached.
        place = (so_far == (wanted - self.before[block] + 1)[:, None]).argmax(1)
        return block * _BLOCK + place - self.first[piece]


class LeftOut(TypedDict):
    """Rows and hard negatives of one source, how many of them thresholds leave out, and how many have no score."""

    rows: int
    rows_left_out: int
    rows_without_score: int
    negatives: int
    negatives_left_out: int
    negatives_without_score: int


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
    # int8, how many rows of the same group of semantic duplicates come before each of a piece's rows; empty if all 0.
    layer: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))
    # If some rows are left out, `rows` counts the others; None if none are.
    kept: KeptRows | None = None
    # What was left out of each source.
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

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

    def require_source(self, name: str, key: str) -> None:
        """Raise UsageError, which names the configuration's `key`, if there is no source of that name."""
        if self.sources == [WHOLE_CORPUS]:
            raise UsageError(
                f"{key}: these shards do not tell sources apart (batches.stratify: random or cluster.scope: corpus)"
            )
        if name not in self.sources:
            raise UsageError(f"{key}: the shards have no such source")

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
            layer=table["layer"].to_numpy() if "layer" in table.column_names else np.empty(0, np.int8),
        )
