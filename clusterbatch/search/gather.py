"""Input of a search: rows gathered by partition, and the block of queries that one work item searches for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import SIDES, TaskUnit, VectorSource, vector_values
from clusterbatch.hashing import document_id_hashes, row_hashes
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search.neighbours import ApproximateIndex, Approximation, GroupKeys, Neighbours, neighbours
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.shuffle import BUNDLE_BYTES, bundle_buckets, iterate_bucket, read_buckets, write_buckets
from clusterbatch.store.workspace import Workspace

# Content of a part, in its details under "holds".
VECTORS, TEXTS = "vectors", "texts"
_COLUMNS = ["pair_id", "source", "query_hash", "document_hash"]
# Column with the hash of the document that a row's text is a part of.
_WHOLE = "document_id_hash"
# Column with lists of hashes of the negatives that rows have in the corpus.
_GIVEN = "negative_hashes"
# Queries of one work item: each item reads the documents of its partition once.
_BLOCK_ROWS = 16_384


class GatherWorker:
    """Write the vectors of a task's rows and, unless `texts` is false, their documents' texts, by partition.

    document_ids: whether to write hashes of the rows' document ids too; a search then finds no other part of the
    document that a query's own text is from. negatives: whether to write hashes of the rows' negatives, which a search
    then does not find again.
    """

    def __init__(
        self,
        config: RunConfig,
        generation: int,
        partitions: Partitions,
        texts: bool = True,
        document_ids: bool = False,
        negatives: bool = False,
    ) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._partitions, self._seed = partitions, config.mine.seed
        self._texts, self._document_ids, self._negatives = texts, document_ids, negatives

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
        asked = {"document": self._texts, "document_id": self._document_ids, "negatives": self._negatives}
        wanted = [name for name, is_asked in asked.items() if is_asked]
        rows = read_row_group(self._corpus, unit.unit, _COLUMNS + wanted)
        vectors = self._vectors.read(unit, SIDES)
        columns = {
            "task": np.full(rows.num_rows, task),
            "unit": np.full(rows.num_rows, unit.unit.number),
            "row": np.arange(rows.num_rows),
            "draw": row_hashes(rows["pair_id"], self._seed + 3),
            **{name: rows[name] for name in ("query_hash", "document_hash")},
            **{name: vectors[name] for name in ("query_vector", "document_vector")},
        }
        if self._document_ids:
            columns[_WHOLE] = document_id_hashes(rows["source"], rows["document_id"])
        if self._negatives:
            given = [texts or [] for texts in rows["negatives"].to_pylist()]
            columns[_GIVEN] = pa.array([[text_hash(text) for text in texts] for texts in given], pa.list_(pa.uint64()))
        texts = rows.select(["document"] if self._texts else [])
        return self._partitions.of_rows(rows["source"]), pa.table(columns), texts


@dataclass(frozen=True)
class Block:
    """The queries of some partitions that are in the gathered parts [first, stop).

    Several partitions, or a small one, are whole, and are read together: read one by one, requests would grow with the
    product of partitions and parts.
    """

    partitions: range
    first: int
    stop: int
    together: bool


def blocks(gathered: Sequence[Part], partitions: Partitions) -> list[WorkItem]:
    """Cut the queries of all partitions into work items of about `_BLOCK_ROWS` rows; payload: `Block`.

    gathered: the parts of all contents.
    """
    vectors = [part for part in gathered if part.details["holds"] == VECTORS]
    rows = np.array([part.details["rows_of"] for part in vectors], np.int64).reshape(-1, len(partitions.names))
    of_partition = rows.sum(axis=0)
    each = max(1.0, sum(part.bytes for part in gathered) / max(1, int(of_partition.sum())))
    most = min(_BLOCK_ROWS, BUNDLE_BYTES / each)
    items: list[WorkItem] = []

    def add(block: Block, count: int) -> None:
        if count:
            covers = (block.partitions.start, block.partitions.stop, block.first, block.stop)
            items.append(WorkItem(len(items), count, block, covers))

    for bundle in bundle_buckets(each * of_partition, each * most):
        count = int(of_partition[bundle.start : bundle.stop].sum())
        if len(bundle) > 1 or count <= most:
            add(Block(bundle, 0, len(vectors), together=True), count)
            continue
        # One partition.
        of_part = rows[:, bundle.start]
        block = np.cumsum(of_part) // _BLOCK_ROWS
        edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(of_part)]
        for first, stop in pairwise(edges):
            add(Block(bundle, first, stop, together=False), int(of_part[first:stop].sum()))
    return items


class Gathered:
    """Gathered rows; those of a partition are numbered in the order of `parts`, the ones with vectors.

    approximate: which partitions are searched approximately; None: none.
    """

    def __init__(self, artifact: Artifact, parts: Sequence[Part], approximate: Approximation | None = None) -> None:
        self._artifact, self._parts, self._approximate = artifact, parts, approximate
        self._held: dict[int, pa.Table] = {}
        self._keys: tuple[int, GroupKeys] | None = None
        self._index: tuple[int, ApproximateIndex] | None = None

    def queries(self, block: Block) -> Iterator[tuple[int, pa.Table]]:
        """Yield the block's partitions with their rows; what is read together is held until the next block."""
        self.hold(block.partitions if block.together else range(0))
        if block.together:
            yield from self._held.items()
            return
        [partition] = block.partitions
        parts = self._parts[block.first : block.stop]
        yield partition, pa.concat_tables(iterate_bucket(self._artifact, parts, partition))

    def hold(self, partitions: range) -> None:
        """Read all rows of these partitions together, and keep them instead of those held before."""
        self._held = {}
        if partitions:
            tables = read_buckets(self._artifact, self._parts, partitions)
            self._held = {n: table for n, table in zip(partitions, tables, strict=True) if table is not None}

    def pieces(self, partition: int) -> Iterator[pa.Table]:
        """Yield all rows of a partition, piece by piece."""
        if partition in self._held:
            return iter([self._held[partition]])
        return iterate_bucket(self._artifact, self._parts, partition)

    def search(self, partition: int, rows: pa.Table, k: int, ranks: int = 0) -> Neighbours:
        """Return the k nearest documents, in their partition, of the queries of `rows`.

        The ranks of the rows' own documents are exact up to `ranks`, unless the search is approximate.
        """
        query, own = vector_values(rows["query_vector"]), vector_values(rows["document_vector"])
        hashes, keys = rows["query_hash"].to_numpy(), self._keys_of(partition)
        whole = rows[_WHOLE].to_numpy() if _WHOLE in rows.column_names else None
        given = _given_documents(rows[_GIVEN], keys) if _GIVEN in rows.column_names else None
        if self._approximate is not None and self.is_approximate(partition):
            index = self._index_of(partition, keys, self._approximate.probes)
            return index.search(query, hashes, own, k, ranks, whole, given)
        return neighbours(query, hashes, own, self._documents(partition), keys, k, whole, given)

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
            names = ("query_hash", "document_hash", _WHOLE)
            pieces = [
                [piece[name].to_numpy() for name in names if name in piece.column_names]
                for piece in self.pieces(partition)
            ]
            self._keys = partition, GroupKeys(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
        return self._keys[1]


def _given_documents(hashes: pa.ChunkedArray, keys: GroupKeys) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of queries and of the group's documents that are their negatives, two (pairs,) int64.

    hashes: (Q,) lists of hashes of the queries' negatives, of which other groups may have the documents.
    """
    lists = hashes.combine_chunks()
    query = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy(zero_copy_only=False))
    document = keys.rows_of(lists.flatten().to_numpy(zero_copy_only=False))
    return query[document >= 0], document[document >= 0]
