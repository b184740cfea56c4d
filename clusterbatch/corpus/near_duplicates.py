"""Near-duplicate pairs of the corpus itself: pairs whose query and document are both near those of an earlier pair.

No pair is compared with all others. Pass 1 leaves, for each band of a pair's signature, an entry bucketed by that band;
pairs that have a band in common meet in a bucket and are compared there. The result is bucketed by document, as the
pairs are when the corpus is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from clusterbatch.corpus.minhash import PERMUTATIONS, bands, signatures
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.schema import VECTORS
from clusterbatch.store.artifact import Artifact, Counts, Part
from clusterbatch.store.shuffle import read_bucket, write_buckets

NEAR_PAIR = "near duplicate of another pair"
# Roles of parts: entries by band, and pairs that were found to be near an earlier one.
ENTRIES = "near entries"
FOUND = "near duplicates"

# Pairs whose entries are made at once, and their bytes: entries are 2.6 KB a pair, however short its texts.
_PAIRS_ROWS, _PAIRS_BYTES = 2**17, 32 * 2**20
# 16 bits of each hash are enough to compare by: one in 65,536 unequal ones looks equal (Li and Koenig 2010).
_SIGNATURE = pa.list_(pa.uint16(), PERMUTATIONS)
_ORIGIN = [pa.field("document_hash", pa.uint64()), pa.field("slice", pa.int64()), pa.field("position", pa.int64())]
_ENTRY = pa.schema(
    [
        pa.field("band", pa.uint64()),
        *_ORIGIN,
        # Of the vectors that came with the pair: those of another length than the corpus' are rejected.
        pa.field("dimensions", pa.int32()),
        pa.field("query", _SIGNATURE),
        pa.field("document", _SIGNATURE),
    ]
)


def write_entries(output: Artifact, number: int, pairs: pa.Table, threshold: float, buckets: int) -> Iterator[Part]:
    """Write the entries of `pairs`, bucketed by band, in as many parts as memory asks for.

    number: of the work item, for the names of the parts.
    """
    pieces = max(1, pairs.nbytes // _PAIRS_BYTES, -(-pairs.num_rows // _PAIRS_ROWS))
    rows = max(1, -(-pairs.num_rows // pieces))
    for start in range(0, pairs.num_rows, rows):
        table = entries(pairs.slice(start, rows), threshold)
        bucket_of_row = (table["band"].to_numpy() % np.uint64(buckets)).astype(np.int64)
        yield write_buckets(output, number, table, bucket_of_row, buckets, role=ENTRIES)


def entries(pairs: pa.Table, threshold: float) -> pa.Table:
    """Return one row for each pair and band of its signature; `pairs` have slice and position."""
    query = signatures(pairs["query"].to_pylist(), b"?")
    document = signatures(pairs["document"].to_pylist())
    # If queries and documents are both that similar, so are the two together: ratios of sums lie between the ratios.
    together = np.minimum(query, document)
    tables = []
    origin = pairs.select([field.name for field in _ORIGIN])
    columns = [*origin.columns, _dimensions(pairs), _column(query), _column(document)]
    for number, piece in enumerate(bands(threshold)):
        keys = [xxhash.xxh3_64_intdigest(row.tobytes(), seed=number) for row in together[:, piece]]
        tables.append(pa.table([pa.array(keys, pa.uint64()), *columns], schema=_ENTRY))
    return pa.concat_tables(tables)


def _dimensions(pairs: pa.Table) -> pa.ChunkedArray | pa.Array:
    """Return the length of each pair's vectors, -1 if they differ and null if there are none, (n,) int32."""
    given = [pc.list_value_length(pairs[name]) for name in VECTORS if name in pairs.column_names]
    if not given:
        return pa.nulls(pairs.num_rows, pa.int32())
    return pc.if_else(pc.equal(given[0], given[-1]), given[0], -1).cast(pa.int32())


def near_earlier(table: pa.Table, threshold: float) -> np.ndarray:
    """Return which entries are near an earlier one with the same band, (n,) bool.

    `table` is in the order of slice and position.
    """
    keys = table["band"].to_numpy()
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    found = np.zeros(table.num_rows, bool)
    groups = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]
    if not groups:
        return found
    query, document = (_signatures(table[name]) for name in ("query", "document"))
    codes = _band_codes(query, threshold)
    for rows in groups:
        # Only entries that have a band of the query in common as well are compared, as one document may have many
        # queries; and only with entries that are not near others, as one pair may have many copies.
        leaders: dict[int, list[int]] = {}
        for row in rows.tolist():
            rivals = {leader for code in codes[row] for leader in leaders.get(code, ())}
            if any(
                _alike(query, row, leader, threshold) and _alike(document, row, leader, threshold) for leader in rivals
            ):
                found[row] = True
            else:
                for code in codes[row]:
                    leaders.setdefault(code, []).append(row)
    return found


def _alike(signatures: np.ndarray, one: int, other: int, threshold: float) -> bool:
    return int(np.count_nonzero(signatures[one] == signatures[other])) >= threshold * PERMUTATIONS


def _band_codes(signatures: np.ndarray, threshold: float) -> list[list[int]]:
    """Return (n, bands) numbers that are equal if signatures have that band in common."""
    codes, pieces = [], bands(threshold)
    for number, piece in enumerate(pieces):
        columns = np.ascontiguousarray(signatures[:, piece])
        whole = columns.view(np.dtype((np.void, columns.itemsize * columns.shape[1]))).ravel()
        codes.append(np.unique(whole, return_inverse=True)[1] * len(pieces) + number)
    numbers: list[list[int]] = np.stack(codes, axis=1).tolist()
    return numbers


class NearPairsWorker:
    """Compare the pairs of one bucket of bands; write those that are near an earlier one, bucketed by document.

    dimensions: length of the corpus' vectors; pairs with others, which are rejected, are near none. None: no vectors.
    """

    def __init__(
        self, parts: Sequence[tuple[Artifact, Part]], threshold: float, buckets: int, dimensions: int | None
    ) -> None:
        self._parts = parts
        self._dimensions = dimensions
        self._threshold = threshold
        self._buckets = buckets

    def process(self, item: WorkItem, output: Artifact) -> Result:
        tables = [_ENTRY.empty_table()]
        for place in dict.fromkeys(place for place, _ in self._parts):
            table = read_bucket(place, [part for holder, part in self._parts if holder == place], item.number)
            if table is not None:
                tables.append(table)
        table = pa.concat_tables(tables)
        if self._dimensions is not None:
            table = table.filter(pc.fill_null(pc.equal(table["dimensions"], self._dimensions), True))
        table = table.sort_by([("slice", "ascending"), ("position", "ascending")])
        near = near_earlier(table, self._threshold)
        found = table.select([field.name for field in _ORIGIN]).filter(pa.array(near))
        buckets = (found["document_hash"].to_numpy() % np.uint64(self._buckets)).astype(np.int64)
        part = write_buckets(output, item.number, found, buckets, self._buckets, role=FOUND)
        return Result([part], Counts(read=table.num_rows, written=table.num_rows))


@dataclass(frozen=True)
class NearDuplicates:
    """The pairs that are near an earlier one, by bucket of their documents."""

    artifact: Artifact
    parts: tuple[Part, ...]

    def mask(self, bucket: int, pairs: pa.Table) -> np.ndarray:
        """Return which pairs of a bucket are near an earlier one, (n,) bool; `pairs` have slice and position."""
        found = read_bucket(self.artifact, self.parts, bucket)
        if found is None:
            return np.zeros(pairs.num_rows, bool)
        return np.isin(_places(pairs), _places(found))


def _places(rows: pa.Table) -> np.ndarray:
    """Return where each row came from, (n,) values; a row of the input may be several pairs, of several documents."""
    return np.rec.fromarrays([rows[field.name].to_numpy() for field in _ORIGIN])


def _column(signatures: np.ndarray) -> pa.Array:
    narrow = signatures.astype(np.uint16)
    return pa.FixedSizeListArray.from_arrays(pa.array(narrow.ravel()), PERMUTATIONS)


def _signatures(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, PERMUTATIONS)
