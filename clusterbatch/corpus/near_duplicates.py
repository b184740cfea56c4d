"""Near-duplicate pairs of the corpus itself: those whose query and document are both nearly those of an earlier pair.

No pair is compared with all others. Pass 1 leaves, for each band of a pair's signature, an entry bucketed by that band;
pairs that have a band in common meet in a bucket and are compared there. What is found goes back by document, to where
the corpus is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from clusterbatch.corpus.minhash import PERMUTATIONS, bands, signature
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import read_bucket, write_buckets

NEAR_PAIR = "near duplicate of another pair"
# The role of parts with entries by band, and of those that name what was found.
ENTRIES = "near entries"
FOUND = "near duplicates"

# 16 bits of each hash are enough to compare by: one in 65,536 unequal ones looks equal (Li and Koenig 2010).
_SIGNATURE = pa.list_(pa.uint16(), PERMUTATIONS)
_ORIGIN = [pa.field("document_hash", pa.uint64()), pa.field("slice", pa.int64()), pa.field("position", pa.int64())]
_ENTRY = pa.schema(
    [pa.field("band", pa.uint64()), *_ORIGIN, pa.field("query", _SIGNATURE), pa.field("document", _SIGNATURE)]
)


def entries(pairs: pa.Table, threshold: float) -> pa.Table:
    """One row for each pair and band of its signature; `pairs` have slice and position."""
    count = pairs.num_rows
    query = np.array([signature(text, b"?") for text in pairs["query"].to_pylist()]).reshape(count, PERMUTATIONS)
    document = np.array([signature(text) for text in pairs["document"].to_pylist()]).reshape(count, PERMUTATIONS)
    # Where queries and documents are both that similar, so are the two together: ratios of sums lie between the ratios.
    together = np.minimum(query, document)
    tables = []
    origin = pairs.select([field.name for field in _ORIGIN])
    columns = [*origin.columns, _column(query), _column(document)]
    for number, piece in enumerate(bands(threshold)):
        keys = [xxhash.xxh3_64_intdigest(row.tobytes(), seed=number) for row in together[:, piece]]
        tables.append(pa.table([pa.array(keys, pa.uint64()), *columns], schema=_ENTRY))
    return pa.concat_tables(tables)


def near_earlier(table: pa.Table, threshold: float) -> np.ndarray:
    """(n,) bool for entries in the order of slice and position: a pair before it has the same band and is nearly it."""
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
        # Compared are those alone that have a band of the query in common as well, for one document may have many
        # queries; and with those alone that are not near others, for there may be many copies of one pair.
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
    """(n, bands) numbers that are equal where signatures have that band in common."""
    codes, pieces = [], bands(threshold)
    for number, piece in enumerate(pieces):
        columns = np.ascontiguousarray(signatures[:, piece])
        whole = columns.view(np.dtype((np.void, columns.itemsize * columns.shape[1]))).ravel()
        codes.append(np.unique(whole, return_inverse=True)[1] * len(pieces) + number)
    numbers: list[list[int]] = np.stack(codes, axis=1).tolist()
    return numbers


class NearPairsWorker:
    """Compares the pairs of one bucket of bands; leaves which are near an earlier one, bucketed by document."""

    def __init__(
        self,
        artifact: Artifact,
        fingerprint: str,
        parts: Sequence[tuple[Artifact, Part]],
        threshold: float,
        buckets: int,
    ) -> None:
        self._artifact = artifact
        self._fingerprint = fingerprint
        self._parts = parts
        self._threshold = threshold
        self._buckets = buckets

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        tables = [_ENTRY.empty_table()]
        for place in dict.fromkeys(place for place, _ in self._parts):
            table = read_bucket(place, [part for holder, part in self._parts if holder == place], unit.number)
            if table is not None:
                tables.append(table)
        table = pa.concat_tables(tables).sort_by([("slice", "ascending"), ("position", "ascending")])
        near = near_earlier(table, self._threshold)
        found = table.select([field.name for field in _ORIGIN]).filter(pa.array(near))
        buckets = (found["document_hash"].to_numpy() % np.uint64(self._buckets)).astype(np.int64)
        part = write_buckets(self._artifact, unit.number, found, buckets, self._buckets, role=FOUND)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=table.num_rows, written=table.num_rows),
            seconds=stopwatch.seconds,
        )
        self._artifact.write_receipt(receipt)
        return receipt


@dataclass(frozen=True)
class NearDuplicates:
    """Which pairs are near an earlier one, by bucket of their documents."""

    artifact: Artifact
    parts: tuple[Part, ...]

    def mask(self, bucket: int, pairs: pa.Table) -> np.ndarray:
        """(n,) bool for the pairs of a bucket, which have slice and position."""
        found = read_bucket(self.artifact, self.parts, bucket)
        if found is None:
            return np.zeros(pairs.num_rows, bool)
        return np.isin(_places(pairs), _places(found))


def _places(rows: pa.Table) -> np.ndarray:
    """(n,) of (slice, position) as one value each."""
    return np.rec.fromarrays([rows["slice"].to_numpy(), rows["position"].to_numpy()])


def _column(signatures: np.ndarray) -> pa.Array:
    narrow = signatures.astype(np.uint16)
    return pa.FixedSizeListArray.from_arrays(pa.array(narrow.ravel()), PERMUTATIONS)


def _signatures(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, PERMUTATIONS)
