"""Pass 1 of ingest: slices of input files become validated rows, bucketed by document; rejects are kept aside.

How an ingest is cut into work items and buckets depends on its input and configuration alone, never on the cluster.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import CorpusConfig, RunConfig
from clusterbatch.corpus.holdout import HoldoutBy, sketch, sketch_schema, sketched
from clusterbatch.corpus.images import with_images
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.near_duplicates import write_entries
from clusterbatch.corpus.readers.dispatch import read_slice
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.corpus.rows import BrokenFileError, rejected
from clusterbatch.corpus.validate import Validated, validate
from clusterbatch.errors import DataError
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.schema import VECTORS
from clusterbatch.store.artifact import Artifact, Counts, Part
from clusterbatch.store.folder import Folder
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.tables import write_parquet

# Roles of parts: rejected rows, candidates to be held out, and hashes of the documents.
REJECTS, SKETCHES, HASHES = "rejects", "sketch", "hashes"
# The reason of valid rows that are of a source the corpus must not have, or were dropped from it.
DROPPED = "deleted"

# About how many bytes of text a byte of input becomes.
TEXT_PER_BYTE = 3
_MOST_BUCKETS = 8192
# Entries for near duplicates are a few kilobytes a pair.
_NEAR_BUCKETS = 4
# Of pass 1. Each bucket is read from every part, so a large input is read in larger items, and written in larger parts.
_MOST_PARTS = 4096
# Bytes of rows that wait to be written. A worker holds them two to three times while it writes them: as they came, one
# after the other, and compressed. So it takes about 700 MiB at most, and inputs beyond 340 GiB have more parts.
_LEAST_WAITING, _MOST_WAITING = 32 * 2**20, 256 * 2**20

# From the rows of a chunk (n,) int64 to the slices they came from and their positions in them, both (n,) int64.
Locate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sorting:
    """Settings by which pass 1 sorts its rows into buckets by document, and of what it leaves beside them.

    `held_out` documents (with `held_out_by: query`, queries) are to be held out (0: none), and their candidates keep
    their texts if `texts_held_out`; `document_ids`: whether rows say what they are parts of. Pairs from the similarity
    `near_threshold` on count as near duplicates (None: they are not looked for) and meet in `near_buckets`. `hashes`:
    whether to leave those of the documents, by which rows that the corpus has already are found. Rows are written out
    when `flush_bytes` of them wait, so that a file that cannot be cut needs no more memory than others. Rows of the
    sources `dropped` go no further, so that nothing is held out for them or counts as their copy.
    """

    buckets: int
    held_out: int
    near_threshold: float | None
    near_buckets: int
    hashes: bool
    flush_bytes: int
    dropped: tuple[str, ...]
    texts_held_out: bool = False
    held_out_by: HoldoutBy = "document"
    document_ids: bool = False


def held_out_documents(config: RunConfig) -> int:
    """Return how many documents ingest holds out: none if the user has a test collection."""
    return 0 if config.evaluate.path else config.evaluate.holdout


def bucket_count(input_bytes: int, part_bytes: int) -> int:
    """Return a number of buckets of about one part each; decided by the input alone."""
    return min(_MOST_BUCKETS, max(1, -(-TEXT_PER_BYTE * input_bytes // part_bytes)))


def read_bytes(input_bytes: int, unit_bytes: int) -> int:
    """Return the bytes of input that an item of pass 1 reads: `unit_bytes`, or more of a large input."""
    return max(unit_bytes, -(-input_bytes // _MOST_PARTS))


def flush_bytes(input_bytes: int) -> int:
    """Return the bytes of rows that are written as one part: those of a large input's whole item, as memory allows."""
    return min(_MOST_WAITING, max(_LEAST_WAITING, TEXT_PER_BYTE * input_bytes // _MOST_PARTS))


def sorting(config: RunConfig, input_bytes: int, known_bytes: int | None) -> Sorting:
    """Decide how pass 1 sorts its rows.

    known_bytes: of the input that a growing corpus was made of, None for a new one.
    """
    corpus = config.corpus
    buckets = bucket_count(input_bytes, corpus.part_bytes)
    # Pairs that the corpus has already are compared as well.
    compared = buckets if known_bytes is None else buckets + bucket_count(known_bytes, corpus.part_bytes)
    return Sorting(
        buckets=buckets,
        # A growing corpus keeps what it holds out.
        held_out=held_out_documents(config) if known_bytes is None else 0,
        near_threshold=corpus.near_threshold if corpus.near_duplicates == "set_aside" else None,
        near_buckets=min(_MOST_BUCKETS, _NEAR_BUCKETS * compared),
        hashes=known_bytes is not None,
        flush_bytes=flush_bytes(input_bytes),
        dropped=tuple(corpus.drop_sources),
        texts_held_out=corpus.decontaminate == "near",
        held_out_by=config.evaluate.holdout_by,
        document_ids=corpus.columns.document_id is not None,
    )


class PairSink:
    """Collect the rows of one item and write them as parts; count them, and the texts that were cut."""

    def __init__(self, output: Artifact, number: int, sorting: Sorting) -> None:
        self._output = output
        self._number = number
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
        """Take validated rows; they are written when enough of them wait."""
        table, kept = self._without_dropped(valid)
        self.counts += Counts(
            read=len(valid.rows) + len(valid.rejects),
            written=len(kept),
            rejected=len(valid.rejects),
            set_aside=dict(+Counter({DROPPED: len(valid.rows) - len(kept)})),
        )
        self.cut += valid.cut
        if len(kept):
            if "document_vector" in table.column_names:
                lengths = pc.list_value_length(table[VECTORS[1]]).to_pylist()
                self.dimensions.update(str(length) for length in lengths)
            slices, positions = locate(kept)
            table = table.append_column("slice", pa.array(slices)).append_column("position", pa.array(positions))
            self._pairs.append(table)
            self._bytes += table.nbytes
        if valid.rejects:
            rows = np.array([reject.row for reject in valid.rejects], np.int64)
            refused = rejected(*locate(rows), valid.rejects)
            self._rejects.append(refused)
            self._bytes += refused.nbytes
        if self._bytes >= self._sorting.flush_bytes:
            self._flush()

    def refuse(self, rejects: pa.Table) -> None:
        """Take rows that are rejected already, a table of `REJECTED`."""
        if rejects.num_rows:
            self.counts += Counts(read=rejects.num_rows, rejected=rejects.num_rows)
            self._rejects.append(rejects)
            self._bytes += rejects.nbytes

    def finish(self) -> list[Part]:
        """Write the rows that wait; return all parts."""
        self._flush()
        return self._parts

    def _without_dropped(self, valid: Validated) -> tuple[pa.Table, np.ndarray]:
        """Return the valid rows of all sources that are not dropped, and their positions."""
        if not (self._sorting.dropped and len(valid.rows)):
            return valid.table, valid.rows
        dropped = pc.is_in(valid.table["source"], pa.array(self._sorting.dropped, pa.string())).to_numpy()
        return valid.table.filter(pa.array(~dropped)), valid.rows[~dropped]

    def _flush(self) -> None:
        if self._pairs:
            self._write_pairs(pa.concat_tables(self._pairs))
        if self._rejects:
            table = pa.concat_tables(self._rejects)
            self._parts.append(write_parquet(self._output, f"rejects-{self._number:08d}", table, role=REJECTS))
        self._pairs, self._rejects, self._bytes = [], [], 0

    def _write_pairs(self, table: pa.Table) -> None:
        sorting, number = self._sorting, self._number
        buckets = (table["document_hash"].to_numpy() % np.uint64(sorting.buckets)).astype(np.int64)
        self._parts.append(write_buckets(self._output, number, table, buckets, sorting.buckets, role=PAIRS))
        if sorting.held_out:
            schema = sketch_schema(sorting.texts_held_out, sorting.held_out_by, sorting.document_ids)
            candidates = sketch(table, sketched(sorting.held_out, sorting.held_out_by), schema)
            self._parts.append(write_parquet(self._output, f"sketch-{number:08d}", candidates, role=SKETCHES))
        if sorting.hashes:
            hashes = pa.table({"document_hash": table["document_hash"].unique()})
            self._parts.append(write_parquet(self._output, f"hashes-{number:08d}", hashes, role=HASHES))
        if sorting.near_threshold is not None:
            self._parts += write_entries(self._output, number, table, sorting.near_threshold, sorting.near_buckets)


class ReadWorker:
    """Read one item, a list of slices, into a `PairSink`.

    Details of the result: the rows of each slice, so that positions can be summed, which slices could not be read to
    their end, and which have no negatives in any row.
    """

    def __init__(self, config: CorpusConfig, sorting: Sorting) -> None:
        self._config = config
        self._sorting = sorting

    def process(self, item: WorkItem, output: Artifact) -> Result:
        details: dict[str, Any] = {"slices": [], "broken": [], "absent": []}
        sink = PairSink(output, item.number, self._sorting)
        for piece in item.payload:
            self._read(piece, sink, details, output)
        return Result(sink.finish(), sink.counts, {**details, "cut": sink.cut, "dimensions": sink.dimensions})

    def _read(self, piece: Slice, sink: PairSink, details: dict[str, Any], output: Artifact) -> None:
        """Put the slice's rows into the sink, as many as can be read, and what was seen of it into `details`."""
        storage = output.folder.storage
        base = Folder(posixpath.dirname(piece.file.uri), storage)
        rows, absent = 0, None
        try:
            for chunk in read_slice(piece, self._config, storage):
                rows += chunk.input_rows
                absent = chunk.absent
                for loaded in with_images(chunk, self._config.columns, base):
                    valid = validate(loaded, self._config, piece.file.source)
                    sink.add(valid, lambda rows: (np.full(len(rows), piece.number), rows))
        except BrokenFileError as error:
            if self._config.on_error == "fail":
                raise DataError(
                    f"{piece.file.uri}: {error} (corpus.on_error: reject continues without such files)"
                ) from error
            # Rows that were read before the break stay.
            details["broken"].append((piece.number, piece.file.uri, str(error)))
        details["slices"].append((piece.number, piece.file.uri, rows))
        if absent is not None:
            details["absent"].append((piece.number, piece.file.uri, sorted(absent)))
