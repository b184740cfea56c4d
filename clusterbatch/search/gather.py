"""Input of a search: rows gathered by partition, and the block of queries that one work item searches for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import SIDES, TaskUnit, VectorSource, vector_values
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search.neighbours import ApproximateIndex, Approximation, GroupKeys, Neighbours, neighbours
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.shuffle import iterate_bucket, write_buckets
from clusterbatch.store.workspace import Workspace

# Content of a part, in its details under "holds".
VECTORS, TEXTS = "vectors", "texts"
_COLUMNS = ["pair_id", "source", "query_hash", "document_hash"]
# Queries of one work item: each item reads the documents of its partition once.
_BLOCK_ROWS = 16_384


class GatherWorker:
    """Write the vectors of a task's rows and, unless `texts` is false, their documents' texts, by partition."""

    def __init__(self, config: RunConfig, generation: int, partitions: Partitions, texts: bool = True) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._partitions, self._seed, self._texts = partitions, config.mine.seed, texts

    def process(self, item: WorkItem, output: Artifact) -> Result:
        read = [self._rows(item.number, unit) for unit in item.payload]
        partition = np.concatenate([partitions for partitions, _, _ in read])
        rows = np.bincount(partition, minlength=len(self._partitions.names)).tolist()
        tables = {VECTORS: [vectors for _, vectors, _ in read]}
        if self._texts:
            tables[TEXTS] = [texts for _, _, texts in read]
        parts = [
            write_buckets(
                output, item.number, pa.concat_tables(pieces), partition, len(rows), holds=content, rows_of=rows
            )
            for content, pieces in tables.items()
        ]
        return Result(parts, Counts(read=item.rows, written=item.rows))

    def _rows(self, task: int, unit: TaskUnit) -> tuple[np.ndarray, pa.Table, pa.Table]:
        rows = read_row_group(self._corpus, unit.unit, _COLUMNS + (["document"] if self._texts else []))
        vectors = self._vectors.read(unit, SIDES)
        table = pa.table(
            {
                "task": np.full(rows.num_rows, task),
                "unit": np.full(rows.num_rows, unit.unit.number),
                "row": np.arange(rows.num_rows),
                "draw": row_hashes(rows["pair_id"], self._seed + 3),
                **{name: rows[name] for name in ("query_hash", "document_hash")},
                **{name: vectors[name] for name in ("query_vector", "document_vector")},
            }
        )
        return self._partitions.of_rows(rows["source"]), table, rows.select(["document"] if self._texts else [])


@dataclass(frozen=True)
class Block:
    """The queries of one partition that are in the gathered parts [first, stop)."""

    partition: int
    first: int
    stop: int


def blocks(vectors: Sequence[Part], partitions: Partitions) -> list[WorkItem]:
    """Cut each partition's queries into work items of about `_BLOCK_ROWS` rows; payload: `Block`."""
    items: list[WorkItem] = []
    for partition in range(len(partitions.names)):
        rows = np.array([part.details["rows_of"][partition] for part in vectors])
        block = np.cumsum(rows) // _BLOCK_ROWS
        edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(rows)]
        for first, stop in pairwise(edges):
            of_block = int(rows[first:stop].sum())
            if of_block:
                items.append(WorkItem(len(items), of_block, Block(partition, first, stop)))
    return items


class Gathered:
    """Gathered rows; those of a partition are numbered in the order of `parts`, the ones with vectors.

    approximate: which partitions are searched approximately; None: none.
    """

    def __init__(self, artifact: Artifact, parts: Sequence[Part], approximate: Approximation | None = None) -> None:
        self._artifact, self._parts, self._approximate = artifact, parts, approximate
        self._keys: tuple[int, GroupKeys] | None = None
        self._index: tuple[int, ApproximateIndex] | None = None

    def rows(self, block: Block) -> pa.Table:
        """Return the rows of the block."""
        return pa.concat_tables(iterate_bucket(self._artifact, self._parts[block.first : block.stop], block.partition))

    def pieces(self, partition: int) -> Iterator[pa.Table]:
        """Yield all rows of a partition, piece by piece."""
        return iterate_bucket(self._artifact, self._parts, partition)

    def search(self, partition: int, rows: pa.Table, k: int, ranks: int = 0) -> Neighbours:
        """Return the k nearest documents, in their partition, of the queries of `rows`.

        The ranks of the rows' own documents are exact up to `ranks`, unless the search is approximate.
        """
        query, own = vector_values(rows["query_vector"]), vector_values(rows["document_vector"])
        hashes, keys = rows["query_hash"].to_numpy(), self._keys_of(partition)
        if self._approximate is not None and self.is_approximate(partition):
            index = self._index_of(partition, keys, self._approximate.probes)
            return index.search(query, hashes, own, k, ranks)
        return neighbours(query, hashes, own, self._documents(partition), keys, k)

    def is_approximate(self, partition: int) -> bool:
        """Return whether the partition is searched approximately."""
        return self._approximate is not None and self._approximate.above < len(self._keys_of(partition).document)

    def _documents(self, partition: int) -> Iterator[np.ndarray]:
        return (vector_values(piece["document_vector"]) for piece in self.pieces(partition))

    def _index_of(self, partition: int, keys: GroupKeys, probes: int) -> ApproximateIndex:
        if self._index is None or self._index[0] != partition:
            # Dropped first: memory need not hold two of them.
            self._index = None
            self._index = partition, ApproximateIndex(lambda: self._documents(partition), keys, probes)
        return self._index[1]

    def _keys_of(self, partition: int) -> GroupKeys:
        """Return the keys of a partition, kept for the next block, which is often of the same one."""
        if self._keys is None or self._keys[0] != partition:
            pieces = [
                (piece["query_hash"].to_numpy(), piece["document_hash"].to_numpy()) for piece in self.pieces(partition)
            ]
            self._keys = partition, GroupKeys(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
        return self._keys[1]
