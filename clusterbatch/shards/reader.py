"""Reader of shards: few large files in which any run of any cluster can be read on its own.

A shard is several parts of the clusters artifact:

training   one Arrow IPC record-batch message after the other, one per run (token ids, hashes, weight)
vectors    the same runs in the same order with the surrogate's vectors only; absent if they are not kept
runs       the table with the end of each run's messages, and their checksums
rows       Parquet with pair_id and text, same row order, for people and other tools

A teacher's scores are an artifact of their own, of runs in the same order: other scores need no other shards.

Parquet cannot read part of a row group, so the files that training reads are laid out for byte ranges instead.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.errors import DataError
from clusterbatch.schema import CLUSTER_INDEX, scores_schema
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.layout import INDEX, ROWS, RUNS, SCORES, TRAINING, VECTORS, ShardSchema
from clusterbatch.store.artifact import Artifact, Manifest, Part
from clusterbatch.store.checksum import checksum64
from clusterbatch.store.details import ClustersDetails, ScoresDetails, details_of
from clusterbatch.store.tables import read_parquet

# Requests at once to object storage. A local disk answers sooner than a thread starts.
_READERS = 8
# A run takes 12 bytes for each file: 10^9 rows in runs of 64 take 190 MB, twice that if vectors are read as well.
# Tables that were dropped are read again with their shard's next run.
_KEPT_BYTES = 256 * 2**20
# A request, yet to be made, for neighbouring runs of a file.
_Read: TypeAlias = Callable[[], list[pa.RecordBatch]]


class _RunFiles:
    """Files of runs, by number and content, with the table of the runs of each number.

    schemas: by content; counted: name of what is numbered, for messages.
    """

    def __init__(
        self, artifact: Artifact, parts: Iterable[Part], schemas: Mapping[str, pa.Schema], counted: str
    ) -> None:
        self._artifact, self._schemas, self._counted = artifact, schemas, counted
        self._parts = {
            (part.details[counted], part.details["content"]): part
            for part in parts
            if counted in part.details and part.details["content"] != ROWS
        }
        self._tables = RunTables(self._read_table)

    def _bytes(self, number: int, runs: np.ndarray, contents: Sequence[str]) -> np.ndarray:
        ends = [self._tables.get(int(number), content).ends for content in contents]
        return sum(of_file[runs + 1].astype(np.int64) - of_file[runs].astype(np.int64) for of_file in ends)

    def _spans(self, number: int, runs: np.ndarray, content: str) -> list[_Read]:
        """Return what reads the runs (ascending numbers) of one file, a request for each span of neighbouring runs."""
        assert (runs[1:] > runs[:-1]).all(), "runs must ascend"
        starts = np.flatnonzero(runs[1:] > runs[:-1] + 1) + 1
        spans = np.split(runs, starts) if len(starts) else [runs]
        return [partial(self._read_span, number, content, span) for span in spans]

    def _read_span(self, shard: int, content: str, span: np.ndarray) -> list[pa.RecordBatch]:
        """Read consecutive runs; bytes that do not match their checksum are fetched again before they are damaged."""
        part, table = self._part(shard, content), self._tables.get(int(shard), content)
        start, stop = table.span(span[0], span[-1])
        schema = self._schemas[content]
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
            place = self._artifact.folder.uri
            raise DataError(f"{place}: {self._counted} {shard} has no {content} file") from None

    def _place(self, part: Part, shard: int, problem: str) -> str:
        return f"{self._artifact.folder.uri}/{part.path}: {self._counted} {shard}, {problem}"


class ShardReader(_RunFiles):
    """Read runs of a committed clusters artifact by byte range. Picklable: it holds addresses, not connections.

    scores: a teacher's scores of these clusters, whose columns then come with every run.

    Raises DataError if the scores are those of other clusters.
    """

    def __init__(self, artifact: Artifact, scores: Artifact | None = None) -> None:
        manifest = artifact.require()
        schema = ShardSchema(**details_of(manifest, ClustersDetails)["layout"])
        self.schema, self._vectors = schema.training, schema.vectors
        schemas = {TRAINING: self.schema, **({VECTORS: self._vectors.schema} if self._vectors else {})}
        super().__init__(artifact, manifest.parts, schemas, "shard")
        self.index = read_index(artifact, manifest)
        self._scores = None if scores is None else ScoreReader(scores, manifest)

    def run_bytes(self, shard: int, runs: np.ndarray, vectors: bool = False, training: bool = True) -> np.ndarray:
        """Return (len(runs),) int64 bytes that reading each of those runs takes."""
        runs = np.asarray(runs)
        found = self._bytes(shard, runs, self._files(vectors, training))
        return found if self._scores is None else found + self._scores.run_bytes(shard, runs)

    def read_runs(
        self, shard: int, runs: np.ndarray, vectors: bool = False, training: bool = True
    ) -> list[pa.RecordBatch]:
        """Return one record batch per run of `runs` (ascending run numbers).

        With `vectors`, their columns come behind those of `schema`, or alone without `training`; a teacher's scores
        come last. Neighbouring runs take one request; object storage is asked for separate ones side by side. Raises
        DataError that names the shard's file if bytes are missing or damaged.
        """
        runs = np.asarray(runs, dtype=np.int64)
        if len(runs) == 0:
            return []
        reads = {content: self._spans(shard, runs, content) for content in self._files(vectors, training)}
        if self._scores is not None:
            reads[SCORES] = self._scores.reads(shard, runs)
        by_file = _read_all(reads, one_by_one=self._artifact.folder.is_local)
        names = list(self.schema.names) if training else []
        columns = [list(batch.columns) for batch in by_file[TRAINING]] if training else [[] for _ in runs]
        if vectors and self._vectors is not None:
            names += ["query_vector", "document_vector"]
            for of_run, stored in zip(columns, by_file[VECTORS], strict=True):
                of_run += self._vectors.decode(stored)
        if self._scores is not None:
            names += self._scores.schema.names
            for of_run, stored in zip(columns, by_file[SCORES], strict=True):
                of_run += stored.columns
        return [pa.RecordBatch.from_arrays(of_run, names=names) for of_run in columns]

    def _files(self, vectors: bool, training: bool) -> list[str]:
        if vectors and self._vectors is None:
            raise DataError(f"{self._artifact.folder.uri}: these shards were written without the surrogate's vectors")
        return [TRAINING] * training + [VECTORS] * vectors


class ScoreReader(_RunFiles):
    """Read a teacher's scores by runs of the shards; they are stored by unit of work, a range of one shard's runs.

    clusters: the manifest of the clusters that training reads. Raises DataError if the scores are of others.
    """

    def __init__(self, artifact: Artifact, clusters: Manifest) -> None:
        manifest = artifact.require()
        if manifest.inputs.get("clusters") != clusters.fingerprint:
            raise DataError(f"{artifact.folder.uri}: scores of other clusters; run `clusterbatch score` again")
        self.schema = scores_schema(details_of(manifest, ScoresDetails)["negatives"])
        super().__init__(artifact, manifest.parts, {SCORES: self.schema}, "unit")
        units: dict[int, list[tuple[int, int]]] = {}
        for (unit, content), part in self._parts.items():
            if content == SCORES:
                units.setdefault(part.details["shard"], []).append((part.details["first_run"], unit))
        # By shard: the first run of each unit, ascending, and the units.
        self._units = {shard: np.array(sorted(of_shard)).T for shard, of_shard in units.items()}

    def run_bytes(self, shard: int, runs: np.ndarray) -> np.ndarray:
        """Return (len(runs),) int64 bytes that reading each of those runs takes."""
        found = np.zeros(len(runs), np.int64)
        for unit, inside, of_unit in self._by_unit(shard, runs):
            found[of_unit] = self._bytes(unit, inside, [SCORES])
        return found

    def reads(self, shard: int, runs: np.ndarray) -> list[_Read]:
        """Return what reads one record batch per run of `runs` (ascending run numbers), in that order."""
        return [read for unit, inside, _ in self._by_unit(shard, runs) for read in self._spans(unit, inside, SCORES)]

    def _by_unit(self, shard: int, runs: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each unit that has some of the runs, their numbers inside it, and their positions in `runs`."""
        first, units = self._units[int(shard)]
        place = np.searchsorted(first, runs, side="right") - 1
        for number in np.unique(place).tolist():
            here = np.flatnonzero(place == number)
            yield int(units[number]), runs[here] - first[number], here


def _read_all(reads: Mapping[str, Sequence[_Read]], *, one_by_one: bool) -> dict[str, list[pa.RecordBatch]]:
    """Return what the requests for each file give, in order; side by side unless told otherwise."""
    requests = [read for of_file in reads.values() for read in of_file]
    if one_by_one or len(requests) == 1:
        results = [read() for read in requests]
    else:
        with ThreadPoolExecutor(min(_READERS, len(requests))) as pool:
            results = list(pool.map(lambda read: read(), requests))
    following = iter(results)
    return {
        content: [batch for batches in islice(following, len(of_file)) for batch in batches]
        for content, of_file in reads.items()
    }


@dataclass(frozen=True)
class RunTable:
    """Table of one file of a shard with R runs.

    ends: (R + 1,) unsigned bytes, beginning with a zero; checksums: (R,) uint64, XXH3-64.
    """

    ends: np.ndarray
    checksums: np.ndarray

    @property
    def bytes(self) -> int:
        return self.ends.nbytes + self.checksums.nbytes

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the bytes [start, end) of the runs `first` to `last`."""
        return int(self.ends[first]), int(self.ends[last + 1])


class RunTables:
    """Run tables by shard and file, of which the least recently used are dropped first.

    Safe for several threads; pickled without the tables. read: returns the Parquet bytes of a shard's table; limit:
    bytes of the tables that are kept.
    """

    def __init__(self, read: Callable[[int], bytes], limit: int = _KEPT_BYTES) -> None:
        self._read, self._limit = read, limit
        self._clear()

    def _clear(self) -> None:
        self._tables: OrderedDict[tuple[int, str], RunTable] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"_read": self._read, "_limit": self._limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._clear()

    def get(self, shard: int, content: str) -> RunTable:
        """Return the table of the file of a shard that holds `content`."""
        key = (shard, content)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        # Threads that want the same table read it side by side; the last one is kept.
        columns = pq.read_table(pa.BufferReader(self._read(shard)), columns=[f"{content}_end", f"{content}_checksum"])
        ends = np.concatenate([[0], columns[f"{content}_end"].to_numpy()])
        table = RunTable(ends.astype(np.min_scalar_type(ends[-1])), columns[f"{content}_checksum"].to_numpy().copy())
        with self._lock:
            previous = self._tables.pop(key, None)
            self._bytes += table.bytes - (previous.bytes if previous else 0)
            self._tables[key] = table
            while self._bytes > self._limit and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].bytes
        return table


def index_table(pieces: Sequence[dict[str, Any]]) -> pa.Table:
    """Return the table of schema.CLUSTER_INDEX, one row per piece; `crowding` and `layer` only if a piece has any."""
    columns = {name: [piece[name] for piece in pieces] for name in CLUSTER_INDEX.names}
    # JSON has no NaN: a receipt gives None instead.
    columns["mean_cosine"] = [math.nan if value is None else value for value in columns["mean_cosine"]]
    table = pa.table(columns, schema=CLUSTER_INDEX)
    for name, kind in (("crowding", pa.float32()), ("layer", pa.int8())):
        if any(name in piece for piece in pieces):
            table = table.append_column(name, pa.array([piece.get(name, 0) for piece in pieces], kind))
    return table


def read_index(artifact: Artifact, manifest: Manifest) -> ClusterIndex:
    """Read the cluster index of a committed clusters artifact."""
    part = next(part for part in manifest.parts if part.details.get("content") == INDEX)
    return ClusterIndex.from_table(
        read_parquet(artifact.folder, part),
        details_of(manifest, ClustersDetails)["layout"]["run_rows"],
        manifest.fingerprint,
    )
