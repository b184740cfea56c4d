"""What a search reads: rows met by group, and which of them one unit searches for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import SIDES, TaskUnit, VectorSource, vector_values
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Unit
from clusterbatch.search.neighbours import ApproximateIndex, Approximation, GroupKeys, Neighbours, neighbours
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import iterate_bucket, write_buckets
from clusterbatch.store.workspace import Workspace

# What a part holds, in its details under "holds".
VECTORS, TEXTS = "vectors", "texts"
_COLUMNS = ["pair_id", "source", "query_hash", "document_hash"]
# Queries that one unit searches: each reads the documents of its group once.
_BLOCK_ROWS = 16_384


class GatherWorker:
    """Writes a task's vectors and, where they are wanted, its documents' texts, each bucketed by group."""

    def __init__(
        self, config: RunConfig, generation: int, groups: Groups, output: Artifact, fingerprint: str, texts: bool = True
    ) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._groups, self._output, self._fingerprint = groups, output, fingerprint
        self._seed, self._texts = config.mine.seed, texts

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        read = [self._rows(unit.number, item) for item in unit.payload]
        group = np.concatenate([groups for groups, _, _ in read])
        rows = np.bincount(group, minlength=len(self._groups.names)).tolist()
        held = {VECTORS: [vectors for _, vectors, _ in read], TEXTS: [texts for _, _, texts in read]}
        parts = [
            write_buckets(
                self._output, unit.number, pa.concat_tables(tables), group, len(rows), holds=holds, rows_of=rows
            )
            for holds, tables in held.items()
            if holds == VECTORS or self._texts
        ]
        counts = Counts(read=unit.rows, written=unit.rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=parts, counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt

    def _rows(self, task: int, item: TaskUnit) -> tuple[np.ndarray, pa.Table, pa.Table]:
        rows = read_row_group(self._corpus, item.unit, _COLUMNS + (["document"] if self._texts else []))
        vectors = self._vectors.read(item, SIDES)
        table = pa.table(
            {
                "task": np.full(rows.num_rows, task),
                "unit": np.full(rows.num_rows, item.unit.number),
                "row": np.arange(rows.num_rows),
                "draw": row_hashes(rows["pair_id"], self._seed + 3),
                **{name: rows[name] for name in ("query_hash", "document_hash")},
                **{name: vectors[name] for name in ("query_vector", "document_vector")},
            }
        )
        return self._groups.of_rows(rows["source"]), table, rows.select(["document"] if self._texts else [])


@dataclass(frozen=True)
class Block:
    """The queries of one group that lie in parts [first, stop) of what was gathered."""

    group: int
    first: int
    stop: int


def blocks(vectors: Sequence[Part], groups: Groups) -> list[Unit]:
    """Consecutive parts of a group, so many that a unit has about _BLOCK_ROWS queries."""
    units: list[Unit] = []
    for group in range(len(groups.names)):
        rows = np.array([part.details["rows_of"][group] for part in vectors])
        block = np.cumsum(rows) // _BLOCK_ROWS
        edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(rows)]
        for first, stop in pairwise(edges):
            here = int(rows[first:stop].sum())
            if here:
                units.append(Unit(len(units), here, Block(group, first, stop)))
    return units


class Gathered:
    """What was gathered; the rows of a group are numbered in the order of `parts`, those that hold vectors.

    approximate: which groups are not searched exactly; unset: none.
    """

    def __init__(self, artifact: Artifact, parts: Sequence[Part], approximate: Approximation | None = None) -> None:
        self._artifact, self._parts, self._approximate = artifact, parts, approximate
        self._keys: tuple[int, GroupKeys] | None = None
        self._index: tuple[int, ApproximateIndex] | None = None

    def rows(self, block: Block) -> pa.Table:
        """The block's own rows."""
        return pa.concat_tables(iterate_bucket(self._artifact, self._parts[block.first : block.stop], block.group))

    def pieces(self, group: int) -> Iterator[pa.Table]:
        """All rows of a group, piece by piece."""
        return iterate_bucket(self._artifact, self._parts, group)

    def search(self, group: int, rows: pa.Table, k: int, ranks: int = 0) -> Neighbours:
        """The k nearest documents of the queries of `rows`, in their group.

        Ranks of their own documents are exact up to `ranks`, or as near to that as an approximate search comes.
        """
        query, own = vector_values(rows["query_vector"]), vector_values(rows["document_vector"])
        hashes, keys = rows["query_hash"].to_numpy(), self._group_keys(group)
        if self._approximate is not None and self._approximate.above < len(keys.document):
            return self._group_index(group, keys, self._approximate.probes).search(query, hashes, own, k, ranks)
        return neighbours(query, hashes, own, self._documents(group), keys, k)

    def _documents(self, group: int) -> Iterator[np.ndarray]:
        return (vector_values(piece["document_vector"]) for piece in self.pieces(group))

    def _group_index(self, group: int, keys: GroupKeys, probes: int) -> ApproximateIndex:
        if self._index is None or self._index[0] != group:
            # The one before goes first: two do not have to fit.
            self._index = None
            self._index = group, ApproximateIndex(lambda: self._documents(group), keys, probes)
        return self._index[1]

    def _group_keys(self, group: int) -> GroupKeys:
        """Kept for the next block, which is often of the same group."""
        if self._keys is None or self._keys[0] != group:
            pieces = [
                (piece["query_hash"].to_numpy(), piece["document_hash"].to_numpy()) for piece in self.pieces(group)
            ]
            self._keys = group, GroupKeys(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
        return self._keys[1]
