"""Where pass 1 of ingest puts its rows: valid ones bucketed by document, the others aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.corpus.holdout import sketch
from clusterbatch.corpus.near_pairs import ENTRIES, entries
from clusterbatch.corpus.rejecting import rejected
from clusterbatch.corpus.rows import Reject
from clusterbatch.corpus.units import PAIRS
from clusterbatch.corpus.validate import Validated
from clusterbatch.store.artifact import Artifact, Counts, Part
from clusterbatch.store.exchange import write_buckets
from clusterbatch.store.tables import write_parquet

# The role of parts that hold rejected rows.
REJECTS = "rejects"
DOCUMENT_VECTOR = "document_vector"
# And of those that hold candidates to be held out.
SKETCH = "sketch"
# And of those that hold the hashes of the documents.
HASHES = "hashes"
# Rows are written out when this many bytes wait, so that a file that cannot be cut needs no more memory than others.
_FLUSH_BYTES = 32 * 2**20

# From the rows of a chunk (n,) int64 to the slices they came from and their positions in them, both (n,) int64.
Locate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sorting:
    """How pass 1 sorts its rows: into buckets by document, and what it leaves beside them.

    `held_out` documents are to be held out (0: none). Pairs from the similarity `near_threshold` on count as near
    duplicates (None: they are not looked for) and meet in `near_buckets`. `hashes`: whether to leave those of the
    documents, by which rows that the corpus has already are found.
    """

    buckets: int
    held_out: int
    near_threshold: float | None
    near_buckets: int
    hashes: bool = False


class PairSink:
    """Collects the rows of one unit and writes them as parts; counts them, and the texts that were cut."""

    def __init__(self, exchange: Artifact, unit: int, sorting: Sorting) -> None:
        self._exchange = exchange
        self._unit = unit
        self._sorting = sorting
        self._pairs: list[pa.Table] = []
        self._rejects: list[pa.Table] = []
        self._bytes = 0
        self._parts: list[Part] = []
        self.counts = Counts()
        self.cut = 0
        # Rows by the length of the vectors that came with them.
        self.dimensions: Counter[str] = Counter()

    def add(self, valid: Validated, locate: Locate) -> None:
        self.counts += Counts(
            read=len(valid.rows) + len(valid.rejects), written=len(valid.rows), rejected=len(valid.rejects)
        )
        self.cut += valid.cut
        if len(valid.rows):
            if DOCUMENT_VECTOR in valid.table.column_names:
                lengths = pc.list_value_length(valid.table[DOCUMENT_VECTOR]).to_pylist()
                self.dimensions.update(str(length) for length in lengths)
            slices, positions = locate(valid.rows)
            table = valid.table.append_column("slice", pa.array(slices)).append_column("position", pa.array(positions))
            self._pairs.append(table)
            self._bytes += table.nbytes
        if valid.rejects:
            rows = np.array([reject.row for reject in valid.rejects], np.int64)
            self._reject(*locate(rows), valid.rejects)
        if self._bytes >= _FLUSH_BYTES:
            self._flush()

    def refuse(self, rejects: pa.Table) -> None:
        """Rows that are rejected already, a table of `REJECTED`."""
        if rejects.num_rows:
            self.counts += Counts(read=rejects.num_rows, rejected=rejects.num_rows)
            self._rejects.append(rejects)
            self._bytes += rejects.nbytes

    def refuse_rest(self, piece: int, reason: str) -> None:
        """What follows in this slice's file cannot be read; counts as one row."""
        self.counts += Counts(read=1, rejected=1)
        self._reject(np.array([piece]), None, [Reject(None, reason)])

    def _reject(self, slices: np.ndarray, positions: np.ndarray | None, rejects: Sequence[Reject]) -> None:
        table = rejected(slices, positions, rejects)
        self._rejects.append(table)
        self._bytes += table.nbytes

    def finish(self) -> list[Part]:
        self._flush()
        return self._parts

    def _flush(self) -> None:
        if self._pairs:
            table = pa.concat_tables(self._pairs)
            count = self._sorting.buckets
            buckets = (table["document_hash"].to_numpy() % np.uint64(count)).astype(np.int64)
            part = write_buckets(self._exchange, self._unit, table, buckets, count, role=PAIRS)
            self._parts.append(part)
            if self._sorting.held_out:
                candidates = sketch(table, self._sorting.held_out)
                self._parts.append(write_parquet(self._exchange, f"sketch-{self._unit:08d}", candidates, role=SKETCH))
            if self._sorting.hashes:
                hashes = pa.table({"document_hash": table["document_hash"].unique()})
                self._parts.append(write_parquet(self._exchange, f"hashes-{self._unit:08d}", hashes, role=HASHES))
            if self._sorting.near_threshold is not None:
                self._parts.append(self._write_near(table, self._sorting.near_threshold))
        if self._rejects:
            table = pa.concat_tables(self._rejects)
            self._parts.append(write_parquet(self._exchange, f"rejects-{self._unit:08d}", table, role=REJECTS))
        self._pairs, self._rejects, self._bytes = [], [], 0

    def _write_near(self, pairs: pa.Table, threshold: float) -> Part:
        table, count = entries(pairs, threshold), self._sorting.near_buckets
        buckets = (table["band"].to_numpy() % np.uint64(count)).astype(np.int64)
        return write_buckets(self._exchange, self._unit, table, buckets, count, role=ENTRIES)
