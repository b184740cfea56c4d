"""Pass 1 of ingest: slices of input files become validated rows, sorted into buckets by document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.inputs import InputFile, Slice
from clusterbatch.corpus.readers import read_slice
from clusterbatch.corpus.rows import BrokenFileError, Reject
from clusterbatch.corpus.units import PAIRS
from clusterbatch.corpus.validate import Validated, validate
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import write_buckets
from clusterbatch.store.tables import write_parquet

# About how many bytes of text a byte of input becomes.
_EXPANSION = 3
_MOST_BUCKETS = 8192
# Rows are written out when this many bytes wait, so that a file that cannot be cut needs no more memory than others.
_FLUSH_BYTES = 32 * 2**20

REJECTED = pa.schema(
    [
        pa.field("slice", pa.int64(), nullable=False),
        # Zero-based position in the slice; null where the rest of the file is meant.
        pa.field("position", pa.int64()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("content", pa.string()),
    ]
)


def bucket_count(config: CorpusConfig, files: Iterable[InputFile]) -> int:
    """Buckets of about one part each; decided by the input alone."""
    text = _EXPANSION * sum(file.size for file in files)
    return min(_MOST_BUCKETS, max(1, -(-text // config.part_bytes)))


class ReadWorker:
    """Reads one unit, a list of slices. Its receipt tells the rows of each slice, so that positions can be summed."""

    def __init__(self, exchange: Artifact, fingerprint: str, config: CorpusConfig, buckets: int) -> None:
        self._exchange = exchange
        self._fingerprint = fingerprint
        self._config = config
        self._buckets = buckets

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        rows = _Buffer()
        parts: list[Part] = []
        counts = Counts()
        slices: list[tuple[str, int]] = []
        cut = 0
        for piece in unit.payload:
            rows_of_slice = 0
            for valid in self._valid_rows(piece):
                rows_of_slice += len(valid.rows) + sum(reject.row is not None for reject in valid.rejects)
                counts += Counts(
                    read=len(valid.rows) + len(valid.rejects), written=len(valid.rows), rejected=len(valid.rejects)
                )
                cut += valid.cut
                rows.add(piece.number, valid)
                if rows.bytes >= _FLUSH_BYTES:
                    parts += self._flush(unit.number, rows)
            slices.append((piece.file.uri, rows_of_slice))
        parts += self._flush(unit.number, rows)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=counts,
            seconds=stopwatch.seconds,
            details={"slices": slices, "cut": cut},
        )
        self._exchange.write_receipt(receipt)
        return receipt

    def _valid_rows(self, piece: Slice) -> Iterator[Validated]:
        try:
            for chunk in read_slice(piece, self._config, self._exchange.folder.storage):
                yield validate(chunk, self._config, piece.file.source)
        except BrokenFileError as error:
            if self._config.on_error == "fail":
                raise DataError(
                    f"{piece.file.uri}: {error} (corpus.on_error: reject goes on without such files)"
                ) from error
            # Whatever was read before the break stays; the break itself is listed once, not for each slice.
            if piece.start == 0:
                yield Validated.nothing_but([Reject(None, str(error))], self._config)

    def _flush(self, unit: int, rows: _Buffer) -> list[Part]:
        parts = []
        pairs, rejects = rows.take()
        if pairs is not None:
            buckets = (pairs["document_hash"].to_numpy() % np.uint64(self._buckets)).astype(np.int64)
            bucket_rows = np.bincount(buckets, minlength=self._buckets).tolist()
            parts.append(
                write_buckets(self._exchange, unit, pairs, buckets, self._buckets, role=PAIRS, bucket_rows=bucket_rows)
            )
        if rejects is not None:
            parts.append(write_parquet(self._exchange, f"rejects-{unit:08d}", rejects, role="rejects"))
        return parts


class _Buffer:
    """Rows of one unit that wait to be written."""

    def __init__(self) -> None:
        self._pairs: list[pa.Table] = []
        self._rejects: list[pa.Table] = []
        self.bytes = 0

    def add(self, piece: int, valid: Validated) -> None:
        if len(valid.rows):
            origin = {"slice": pa.array(np.full(len(valid.rows), piece, np.int64)), "position": pa.array(valid.rows)}
            table = valid.table
            for name, column in origin.items():
                table = table.append_column(name, column)
            self._pairs.append(table)
            self.bytes += table.nbytes
        if valid.rejects:
            table = _rejected(piece, valid.rejects)
            self._rejects.append(table)
            self.bytes += table.nbytes

    def take(self) -> tuple[pa.Table | None, pa.Table | None]:
        pairs = pa.concat_tables(self._pairs) if self._pairs else None
        rejects = pa.concat_tables(self._rejects) if self._rejects else None
        self._pairs, self._rejects, self.bytes = [], [], 0
        return pairs, rejects


def _rejected(piece: int, rejects: Sequence[Reject]) -> pa.Table:
    columns: dict[str, Any] = {
        "slice": [piece] * len(rejects),
        "position": [reject.row for reject in rejects],
        "reason": [reject.reason for reject in rejects],
        "content": [reject.content for reject in rejects],
    }
    return pa.table(columns, schema=REJECTED)
