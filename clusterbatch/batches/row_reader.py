"""Reader of rows by (shard, run, row): it fetches whole runs, and keeps those that are soon needed again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from clusterbatch.embedding.vectors import vector_values
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.reader import ShardReader

_SHARDS_AT_ONCE = 8
# Runs of a shard have numbers below this, so that (shard, run) fits one integer.
_RUNS_PER_SHARD = 2**40
# Decoded runs that rows are taken from at once.
_PIECE_BYTES = 2**29


class RowReader:
    """Read rows of shards and count the cost; safe for several threads.

    bytes_read: what came from storage; largest: bytes of the decoded runs of the largest request so far.
    """

    def __init__(self, reader: ShardReader, *, vectors: bool, cache_bytes: int | None, training: bool = True) -> None:
        """training, vectors: the columns to read; `cache_bytes`: how much to keep of what was decoded; None keeps
        nothing."""
        self._reader = reader
        self._columns = {"vectors": vectors, "training": training}
        self._cache = None if cache_bytes is None else _RunCache(cache_bytes)
        self._in_flight: dict[int, Future[dict[int, pa.RecordBatch]]] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.largest = 0

    def read(self, shard: np.ndarray, run: np.ndarray, row: np.ndarray) -> pa.Table:
        """Return the rows (shard[i], run[i], row[i]), in that order; the arrays are (n,) integers."""
        if not len(row):
            # A rank may have no rows; the columns are those of any run.
            index = self._reader.index
            return self.read(index.shard[:1], index.first_run[:1], np.zeros(1, np.int64)).slice(0, 0)
        keys, which = np.unique(shard.astype(np.int64) * _RUNS_PER_SHARD + run, return_inverse=True)
        runs = self._fetch(keys) if self._cache is None else self._through_cache(keys.tolist(), self._cache)
        batches = [runs[key] for key in keys.tolist()]
        with self._lock:
            self.largest = max(self.largest, sum(batch.nbytes for batch in batches))
        return _taken(batches, which, row)

    def _through_cache(self, keys: list[int], cache: _RunCache) -> dict[int, pa.RecordBatch]:
        """Return runs from the cache, from other threads that are fetching them, and the rest from storage."""
        with self._lock:
            runs = cache.get(keys)
            others = {key: self._in_flight[key] for key in keys if key not in runs and key in self._in_flight}
            missing = [key for key in keys if key not in runs and key not in others]
            mine: Future[dict[int, pa.RecordBatch]] = Future()
            self._in_flight.update(dict.fromkeys(missing, mine))
        try:
            found = self._fetch(np.array(missing, dtype=np.int64))
            with self._lock:
                cache.put(found)
            mine.set_result(found)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                for key in missing:
                    del self._in_flight[key]
        return {**runs, **found, **{key: future.result()[key] for key, future in others.items()}}

    def _fetch(self, keys: np.ndarray) -> dict[int, pa.RecordBatch]:
        """Read runs from storage, several shards side by side; `keys` ascend."""
        shards, starts = np.unique(keys // _RUNS_PER_SHARD, return_index=True)
        groups = np.split(keys, starts)[1:]
        if len(shards) <= 1:
            results: Iterable[list[pa.RecordBatch]] = map(self._fetch_shard, shards.tolist(), groups)
        else:
            with ThreadPoolExecutor(min(_SHARDS_AT_ONCE, len(shards))) as pool:
                results = list(pool.map(self._fetch_shard, shards.tolist(), groups))
        return dict(zip(keys.tolist(), (batch for batches in results for batch in batches), strict=True))

    def _fetch_shard(self, shard: int, keys: np.ndarray) -> list[pa.RecordBatch]:
        runs = keys % _RUNS_PER_SHARD
        batches = self._reader.read_runs(shard, runs, **self._columns)
        spent = int(self._reader.run_bytes(shard, runs, **self._columns).sum())
        with self._lock:
            self.bytes_read += spent
        return batches


def _taken(batches: list[pa.RecordBatch], which: np.ndarray, row: np.ndarray) -> pa.Table:
    """Return row `row[i]` of batch `which[i]` for each i.

    Arrow makes one piece of what it takes rows from, whose offsets reach 2 GiB: single rows of as many runs of images
    may be in more than that.
    """
    starts = np.cumsum([batch.num_rows for batch in batches]) - [batch.num_rows for batch in batches]
    piece_of = np.cumsum([batch.nbytes for batch in batches]) // _PIECE_BYTES
    order = np.argsort(piece_of[which], kind="stable")
    tables = []
    for here in np.split(order, np.flatnonzero(np.diff(piece_of[which][order])) + 1):
        first, last = np.searchsorted(piece_of, piece_of[which[here[0]]] + np.array([0, 1]))
        rows = starts[which[here]] - starts[first] + row[here]
        tables.append(pa.Table.from_batches(batches[first:last]).take(pa.array(rows)))
    if len(tables) == 1:
        return tables[0]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return pa.concat_tables(tables).take(pa.array(place))


class StoredVectors:
    """The surrogate's vectors of rows of a cluster index, read from its shards; for plans of super-batches."""

    def __init__(self, reader: ShardReader, index: ClusterIndex) -> None:
        """`index`: the reader's, or what a filter keeps of it."""
        self._rows, self._index = RowReader(reader, vectors=True, training=False, cache_bytes=None), index

    def __call__(self, piece: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors of queries and of documents, (n, m) float16 each, of rows `row` (n,) of pieces (n,).

        Raises DataError if the shards hold none, or they are damaged.
        """
        index = self._index
        run = index.first_run[piece] + row // index.run_rows
        table = self._rows.read(index.shard[piece], run, row % index.run_rows)
        return vector_values(table["query_vector"]), vector_values(table["document_vector"])


class _RunCache:
    """Decoded runs; the least recently used leave first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._runs: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def get(self, keys: Iterable[int]) -> dict[int, pa.RecordBatch]:
        found = {key: self._runs[key] for key in keys if key in self._runs}
        for key in found:
            self._runs.move_to_end(key)
        return found

    def put(self, runs: dict[int, pa.RecordBatch]) -> None:
        for key, batch in runs.items():
            self._runs[key] = batch
            self._bytes += batch.nbytes
        while self._bytes > self._limit and self._runs:
            _, evicted = self._runs.popitem(last=False)
            self._bytes -= evicted.nbytes
