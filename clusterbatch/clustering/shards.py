"""Shards: few large files in which any run of any cluster can be read by itself.

A shard is a group of parts of the clusters artifact:

training   one Arrow IPC record-batch message after the other, one per run (token ids, hashes, weight)
vectors    the same runs in the same order with the surrogate's vectors only; absent where they are not kept
runs       the table that says where each run's messages end, and their checksums
rows       Parquet with pair_id and text, same row order, for people and other tools

Parquet cannot read part of a row group, so what training reads is laid out for byte ranges instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.index import ClusterIndex
from clusterbatch.clustering.run_tables import RunTables
from clusterbatch.clustering.surrogate import SurrogateLayout
from clusterbatch.errors import DataError
from clusterbatch.schema import CLUSTER_INDEX, training_schema
from clusterbatch.store.artifact import Artifact, Manifest, Part
from clusterbatch.store.checksum import checksum64
from clusterbatch.store.tables import read_parquet, write_parquet

# What a part holds, in its details under "content".
TRAINING, VECTORS, RUNS, ROWS, INDEX = "training", "vectors", "runs", "rows", "index"
_READERS = 8


@dataclass(frozen=True)
class ShardLayout:
    """What the columns of all shards of one artifact are; kept in its manifest.

    surrogate_dimensions: width of the stored vectors, None where they are left out; surrogate: how they are stored.
    """

    vocabulary: int
    run_rows: int
    surrogate_dimensions: int | None = None
    surrogate: Literal["float16", "int8"] = "float16"
    negatives: bool = False
    weight: bool = False
    # Sides that are images.
    images: Sequence[str] = ()
    # Whether each negative has its margin to the positive beside it, by the surrogate.
    margins: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Columns of the training file."""
        return training_schema(
            self.vocabulary,
            negatives=self.negatives,
            weight=self.weight,
            images=self.images,
            margins=self.margins,
        )

    @property
    def vectors(self) -> SurrogateLayout | None:
        """Columns of the vectors file."""
        if not self.surrogate_dimensions:
            return None
        return SurrogateLayout(self.surrogate_dimensions, self.surrogate)


class ShardWriter:
    """Collects the pieces of one shard in memory and writes its parts."""

    def __init__(self, layout: ShardLayout) -> None:
        self._layout = layout
        self._files = {TRAINING: _RunFile(layout.schema)}
        if layout.vectors is not None:
            self._files[VECTORS] = _RunFile(layout.vectors.schema)
        self._text: list[pa.Table] = []
        self.pieces: list[dict[str, Any]] = []
        self._rows = 0
        self._runs = 0

    @property
    def bytes(self) -> int:
        """Bytes of tokens and vectors so far."""
        return sum(file.bytes for file in self._files.values())

    def add(self, table: pa.Table, text: pa.Table, **described: Any) -> None:
        """Appends one piece of a cluster: `table` has the training columns (and vectors), `text` the same rows.

        `described` goes into the piece's entry: what of schema.CLUSTER_INDEX the caller knows.
        """
        assert table.num_rows == text.num_rows > 0
        run_rows, training = self._layout.run_rows, self._files[TRAINING]
        first_byte = training.bytes
        for file in self._files.values():
            file.extend(table, run_rows)
        self._text.append(text)
        self.pieces.append(
            {
                **described,
                "first_row": self._rows,
                "rows": table.num_rows,
                "first_run": self._runs,
                "first_byte": first_byte,
                "bytes": training.bytes - first_byte,
            }
        )
        self._rows += table.num_rows
        self._runs += -(-table.num_rows // run_rows)

    def write(self, artifact: Artifact, stem: str, **details: Any) -> list[Part]:
        """The parts of this shard; `details` is put on each of them."""
        parts = []
        table: dict[str, Any] = {}
        for content, file in self._files.items():
            data = file.getvalue()
            parts.append(
                artifact.write_part(f"{stem}-{content}", "arrows", data, self._rows, content=content, **details)
            )
            table[f"{content}_end"] = pa.array(file.ends, pa.int64())
            table[f"{content}_checksum"] = pa.array(file.checksums, pa.uint64())
        runs = write_parquet(artifact, f"{stem}-{RUNS}", pa.table(table), content=RUNS, **details)
        text = pa.concat_tables(self._text)
        rows = write_parquet(artifact, f"{stem}-{ROWS}", text, 8192, content=ROWS, **details)
        return [*parts, runs, rows]


class _RunFile:
    """Messages of one file of a shard, back to back."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = pa.BufferOutputStream()
        self.bytes = 0
        self.ends: list[int] = []
        self.checksums: list[int] = []

    def extend(self, table: pa.Table, run_rows: int) -> None:
        batch = table.select(self._schema.names).cast(self._schema).combine_chunks().to_batches()[0]
        for start in range(0, batch.num_rows, run_rows):
            message = batch.slice(start, run_rows).serialize()
            self._sink.write(message)
            self.bytes += message.size
            self.ends.append(self.bytes)
            self.checksums.append(checksum64(message))

    def getvalue(self) -> memoryview:
        return memoryview(self._sink.getvalue())


class ShardReader:
    """Reads runs of a committed clusters artifact by byte range. Picklable: it holds addresses, not connections."""

    def __init__(self, artifact: Artifact) -> None:
        manifest = artifact.require()
        self._artifact = artifact
        self._layout = ShardLayout(**manifest.details["layout"])
        self._parts = {
            (part.details["shard"], part.details["content"]): part
            for part in manifest.parts
            if "shard" in part.details and part.details["content"] != ROWS
        }
        self._tables = RunTables(self._read_table)
        self.index = read_index(artifact, manifest)
        self.schema = self._layout.schema
        self._vectors = self._layout.vectors

    def run_bytes(self, shard: int, runs: np.ndarray, vectors: bool = False) -> np.ndarray:
        """(len(runs),) int64: what reading each of those runs costs."""
        runs = np.asarray(runs)
        ends = [self._tables.get(int(shard), content).ends.astype(np.int64) for content in self._files(vectors)]
        return sum(of_file[runs + 1] - of_file[runs] for of_file in ends)

    def read_runs(self, shard: int, runs: np.ndarray, vectors: bool = False) -> list[pa.RecordBatch]:
        """One record batch per run of `runs` (ascending run numbers); with `vectors` their columns come last.

        Neighbouring runs come in one request, separate ones side by side. Raises DataError that names the shard's
        file where bytes are missing or damaged.
        """
        runs = np.asarray(runs, dtype=np.int64)
        if len(runs) == 0:
            return []
        assert np.all(np.diff(runs) > 0), "runs must ascend"
        spans = np.split(runs, np.flatnonzero(np.diff(runs) > 1) + 1)
        files = self._files(vectors)
        requests = [(content, span) for content in files for span in spans]
        if len(requests) == 1:
            results: Iterable[list[pa.RecordBatch]] = [self._read_span(shard, *requests[0])]
        else:
            with ThreadPoolExecutor(min(_READERS, len(requests))) as pool:
                results = list(pool.map(lambda request: self._read_span(shard, *request), requests))
        by_file: dict[str, list[pa.RecordBatch]] = {content: [] for content in files}
        for (content, _), batches in zip(requests, results, strict=True):
            by_file[content].extend(batches)
        if not vectors or self._vectors is None:
            return by_file[TRAINING]
        names = [*self.schema.names, "query_vector", "document_vector"]
        return [
            pa.RecordBatch.from_arrays([*training.columns, *self._vectors.decode(stored)], names=names)
            for training, stored in zip(by_file[TRAINING], by_file[VECTORS], strict=True)
        ]

    def _files(self, vectors: bool) -> list[str]:
        if vectors and self._vectors is None:
            raise DataError(f"{self._artifact.folder.uri}: these shards were written without the surrogate's vectors")
        return [TRAINING, VECTORS] if vectors else [TRAINING]

    def _read_span(self, shard: int, content: str, span: np.ndarray) -> list[pa.RecordBatch]:
        """Consecutive runs; what does not match its checksum is fetched a second time before it counts as damaged."""
        part, table = self._part(shard, content), self._tables.get(int(shard), content)
        start, stop = table.span(span[0], span[-1])
        schema = self.schema if content == TRAINING or self._vectors is None else self._vectors.schema
        for _ in range(2):
            try:
                data = pa.py_buffer(self._artifact.folder.read(part.path, start, stop))
            except FileNotFoundError:
                raise DataError(self._place(part, shard, "missing, but named in the manifest")) from None
            places = [table.span(run, run) for run in span.tolist()]
            pieces = [data.slice(first - start, end - first) for first, end in places]
            damaged = [
                run
                for run, piece in zip(span.tolist(), pieces, strict=True)
                if checksum64(piece) != table.checksums[run]
            ]
            if not damaged:
                return [pa.ipc.read_record_batch(piece, schema) for piece in pieces]
        raise DataError(self._place(part, shard, f"run {damaged[0]} is damaged (checksum differs)"))

    def _read_table(self, shard: int) -> bytes:
        return self._artifact.read_part(self._part(shard, RUNS))

    def _part(self, shard: int, content: str) -> Part:
        try:
            return self._parts[int(shard), content]
        except KeyError:
            raise DataError(f"{self._artifact.folder.uri}: shard {shard} has no {content} file") from None

    def _place(self, part: Part, shard: int, problem: str) -> str:
        return f"{self._artifact.folder.uri}/{part.path}: shard {shard}, {problem}"


def index_table(pieces: Sequence[dict[str, Any]]) -> pa.Table:
    """Entries of schema.CLUSTER_INDEX, one per piece."""
    columns = {name: [piece[name] for piece in pieces] for name in CLUSTER_INDEX.names}
    # JSON has no NaN: from a receipt it comes back as None.
    columns["mean_cosine"] = [math.nan if value is None else value for value in columns["mean_cosine"]]
    return pa.table(columns, schema=CLUSTER_INDEX)


def read_index(artifact: Artifact, manifest: Manifest) -> ClusterIndex:
    """The cluster index of a committed clusters artifact."""
    part = next(part for part in manifest.parts if part.details.get("content") == INDEX)
    return ClusterIndex.from_table(
        read_parquet(artifact.folder, part), manifest.details["layout"]["run_rows"], manifest.fingerprint
    )
