"""Pass 1 of ingest: slices of input files become validated rows, bucketed by document.

How an ingest is cut: decided by its input and configuration alone, never by the cluster it runs on.

Where pass 1 of ingest puts its rows: valid ones bucketed by document, the others aside.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import CorpusConfig, RunConfig
from clusterbatch.corpus.holdout import sketch
from clusterbatch.corpus.images import with_images
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.near_duplicates import ENTRIES, entries
from clusterbatch.corpus.readers.dispatch import read_slice
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.corpus.rows import BrokenFileError, rejected
from clusterbatch.corpus.validate import Validated, validate
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.folder import Folder
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.tables import write_parquet

# About how many bytes of text a byte of input becomes.
_EXPANSION = 3
_MOST_BUCKETS = 8192
# Entries for near duplicates are a few kilobytes a pair.
_NEAR_BUCKETS = 4
# Of pass 1. Each bucket is read from every part, so a large input is read in larger units, and written in larger parts.
_MOST_PARTS = 4096
# Bytes of rows that wait to be written. A worker holds them two to three times while it writes them: as they came, one
# after the other, and compressed. So at most it takes about 700 MiB, and of inputs beyond 340 GiB there are more parts.
_LEAST_WAITING, _MOST_WAITING = 32 * 2**20, 256 * 2**20


def held_out_documents(config: RunConfig) -> int:
    """How many documents ingest holds out: none where the user has a test collection."""
    return 0 if config.evaluate.path else config.evaluate.holdout


def bucket_count(input_bytes: int, part_bytes: int) -> int:
    """Buckets of about one part each; decided by the input alone."""
    return min(_MOST_BUCKETS, max(1, -(-_EXPANSION * input_bytes // part_bytes)))


def read_bytes(input_bytes: int, unit_bytes: int) -> int:
    """Bytes of input that a unit of pass 1 reads: `unit_bytes`, or more of a large input."""
    return max(unit_bytes, -(-input_bytes // _MOST_PARTS))


def flush_bytes(input_bytes: int) -> int:
    """Bytes of rows that a unit of pass 1 writes as one part: those of a large input's whole unit, as memory allows."""
    return min(_MOST_WAITING, max(_LEAST_WAITING, _EXPANSION * input_bytes // _MOST_PARTS))


def sorting(config: RunConfig, input_bytes: int, known_bytes: int | None) -> Sorting:
    """How pass 1 sorts its rows. known_bytes: of the input that a growing corpus was made of, None for a new one."""
    corpus = config.corpus
    buckets = bucket_count(input_bytes, corpus.part_bytes)
    # Pairs that are there already are compared as well.
    compared = buckets if known_bytes is None else buckets + bucket_count(known_bytes, corpus.part_bytes)
    return Sorting(
        buckets=buckets,
        # A growing corpus goes on holding out what it does.
        held_out=held_out_documents(config) if known_bytes is None else 0,
        near_threshold=corpus.near_threshold if corpus.near_duplicates == "set_aside" else None,
        near_buckets=min(_MOST_BUCKETS, _NEAR_BUCKETS * compared),
        hashes=known_bytes is not None,
        flush_bytes=flush_bytes(input_bytes),
        dropped=tuple(corpus.drop_sources),
    )


# The role of parts that hold rejected rows.
REJECTS = "rejects"
DOCUMENT_VECTOR = "document_vector"
# And of those that hold candidates to be held out.
SKETCH = "sketch"
# And of those that hold the hashes of the documents.
HASHES = "hashes"
# Why valid rows are not in the corpus that are of a source it is not to have, or were taken out again.
DROPPED = "deleted"
# Entries for near duplicates take several times their pairs' bytes: they are made of so many bytes of pairs at a time.
_NEAR_BYTES = 32 * 2**20

# From the rows of a chunk (n,) int64 to the slices they came from and their positions in them, both (n,) int64.
Locate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sorting:
    """How pass 1 sorts its rows: into buckets by document, and what it leaves beside them.

    `held_out` documents are to be held out (0: none). Pairs from the similarity `near_threshold` on count as near
    duplicates (None: they are not looked for) and meet in `near_buckets`. `hashes`: whether to leave those of the
    documents, by which rows that the corpus has already are found. Rows are written out when `flush_bytes` of them
    wait, so that a file that cannot be cut needs no more memory than others. Rows of the sources `dropped` go no
    further, so that nothing is held out for them or counts as their copy.
    """

    buckets: int
    held_out: int
    near_threshold: float | None
    near_buckets: int
    hashes: bool
    flush_bytes: int
    dropped: tuple[str, ...]


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
        table, kept = self._without_dropped(valid)
        self.counts += Counts(
            read=len(valid.rows) + len(valid.rejects),
            written=len(kept),
            rejected=len(valid.rejects),
            set_aside=dict(+Counter({DROPPED: len(valid.rows) - len(kept)})),
        )
        self.cut += valid.cut
        if len(kept):
            if DOCUMENT_VECTOR in table.column_names:
                lengths = pc.list_value_length(table[DOCUMENT_VECTOR]).to_pylist()
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
        """Rows that are rejected already, a table of `REJECTED`."""
        if rejects.num_rows:
            self.counts += Counts(read=rejects.num_rows, rejected=rejects.num_rows)
            self._rejects.append(rejects)
            self._bytes += rejects.nbytes

    def _without_dropped(self, valid: Validated) -> tuple[pa.Table, np.ndarray]:
        """The valid rows of all other sources, and their positions."""
        if not (self._sorting.dropped and len(valid.rows)):
            return valid.table, valid.rows
        dropped = pc.is_in(valid.table["source"], pa.array(self._sorting.dropped, pa.string())).to_numpy()
        return valid.table.filter(pa.array(~dropped)), valid.rows[~dropped]

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
                for piece in _pieces(table):
                    self._parts.append(self._write_near(piece, self._sorting.near_threshold))
        if self._rejects:
            table = pa.concat_tables(self._rejects)
            self._parts.append(write_parquet(self._exchange, f"rejects-{self._unit:08d}", table, role=REJECTS))
        self._pairs, self._rejects, self._bytes = [], [], 0

    def _write_near(self, pairs: pa.Table, threshold: float) -> Part:
        table, count = entries(pairs, threshold), self._sorting.near_buckets
        buckets = (table["band"].to_numpy() % np.uint64(count)).astype(np.int64)
        return write_buckets(self._exchange, self._unit, table, buckets, count, role=ENTRIES)


def _pieces(pairs: pa.Table) -> Iterator[pa.Table]:
    """The rows in order, about `_NEAR_BYTES` at a time."""
    rows = -(-pairs.num_rows // max(1, pairs.nbytes // _NEAR_BYTES))
    return (pairs.slice(start, rows) for start in range(0, pairs.num_rows, rows))


class ReadWorker:
    """Reads one unit, a list of slices. Its receipt tells the rows of each slice, so that positions can be summed, and
    which slices could not be read to their end."""

    def __init__(self, artifact: Artifact, fingerprint: str, config: CorpusConfig, sorting: Sorting) -> None:
        self._artifact = artifact
        self._fingerprint = fingerprint
        self._config = config
        self._sorting = sorting

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        broken: list[tuple[int, str, str]] = []
        sink = PairSink(self._artifact, unit.number, self._sorting)
        slices = [(piece.number, piece.file.uri, self._read(piece, sink, broken)) for piece in unit.payload]
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=sink.finish(),
            counts=sink.counts,
            seconds=stopwatch.seconds,
            details={"slices": slices, "cut": sink.cut, "dimensions": sink.dimensions, "broken": broken},
        )
        self._artifact.write_receipt(receipt)
        return receipt

    def _read(self, piece: Slice, sink: PairSink, broken: list[tuple[int, str, str]]) -> int:
        """Puts the slice's rows into the sink, as many as can be read; returns how many there were.

        broken: gains slice, file and reason where not all could be read.
        """
        before = sink.counts.read
        base = Folder(posixpath.dirname(piece.file.uri), self._artifact.folder.storage)
        try:
            for chunk in read_slice(piece, self._config, self._artifact.folder.storage):
                chunk = with_images(chunk, self._config.columns, base)
                valid = validate(chunk, self._config, piece.file.source)
                sink.add(valid, lambda rows: (np.full(len(rows), piece.number), rows))
        except BrokenFileError as error:
            if self._config.on_error == "fail":
                raise DataError(
                    f"{piece.file.uri}: {error} (corpus.on_error: reject goes on without such files)"
                ) from error
            # Whatever was read before the break stays.
            broken.append((piece.number, piece.file.uri, str(error)))
        return sink.counts.read - before
