"""One worker's part of every batch, read ahead: runs by byte range, decoded off the training thread."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.batches.plan import BatchPlan, GlobalBatch
from clusterbatch.clustering.shards import ShardReader
from clusterbatch.encoder.tokens import Tokens

_FETCHERS = 4
_MOST_AHEAD = 16


@dataclass(frozen=True)
class Composition:
    """What a global batch is made of, for metrics and reports."""

    stratum: str
    purity: float
    groups: int
    repeated: int


@dataclass(frozen=True)
class SliceBatch:
    """The rows of one rank in the global batch of `step`; n of them. Slices follow each other in rank order.

    negative_tokens holds all hard negatives of row 0, then of row 1, ...; negative_counts (n,) says how many each has.
    slice_rows: (world_size,) int64, the rows of every rank. query_vector, document_vector: (n, m), as stored.
    """

    step: int
    epoch: int
    query_tokens: Tokens
    document_tokens: Tokens
    query_hash: np.ndarray
    document_hash: np.ndarray
    weight: np.ndarray | None
    negative_tokens: Tokens | None
    negative_counts: np.ndarray | None
    query_vector: np.ndarray | None
    document_vector: np.ndarray | None
    slice_rows: np.ndarray
    composition: Composition

    def __len__(self) -> int:
        return len(self.query_tokens)


class SliceLoader:
    """Iterates the slices of `rank` for steps [first_step, last_step), in order.

    At most `prefetch_bytes` are read ahead, never less than one batch. Where the plan moves single rows (a strategy on
    a layout not made for it), decoded runs are kept up to `cache_bytes`, for the same runs are then needed again soon.
    `wait_seconds` is the time that the consumer stood waiting, `bytes_read` what came from storage.
    """

    def __init__(
        self,
        plan: BatchPlan,
        reader: ShardReader,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        *,
        vectors: bool = False,
        prefetch_bytes: int = 64 * 2**20,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        assert 0 <= rank < world_size
        self._plan, self._reader = plan, reader
        self._rank, self._world_size = rank, world_size
        self._steps = range(first_step, last_step)
        self._vectors = vectors
        self._prefetch_bytes = prefetch_bytes
        moves_rows = any(stratum.granule < plan.index.run_rows for stratum in plan.strata)
        self._cache = _RunCache(cache_bytes) if moves_rows else None
        self._lock = threading.Lock()
        self._largest = 0
        self.wait_seconds = 0.0
        self.bytes_read = 0

    def __iter__(self) -> Iterator[SliceBatch]:
        pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="slice-loader")
        ahead: deque[Future[SliceBatch]] = deque()
        steps = iter(self._steps)
        try:
            while True:
                while len(ahead) < self._allowed_ahead() and (step := next(steps, None)) is not None:
                    # The plan is computed here, on one thread: its small caches need no lock.
                    ahead.append(pool.submit(self._fetch, self._plan.batch(step)))
                if not ahead:
                    return
                start = time.perf_counter()
                batch = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _allowed_ahead(self) -> int:
        if not self._largest:
            return 2
        return max(1, min(_MOST_AHEAD, self._prefetch_bytes // self._largest))

    def _fetch(self, batch: GlobalBatch) -> SliceBatch:
        index = self._plan.index
        bounds = batch.slice_bounds(self._world_size, index.run_rows)
        mine = slice(bounds[self._rank], bounds[self._rank + 1])
        piece, row = batch.piece[mine], batch.row[mine]
        shard = index.shard[piece].astype(np.int64)
        run = index.first_run[piece] + row // index.run_rows
        table = self._read(shard, run, row % index.run_rows)
        composition = Composition(batch.stratum.name, batch.purity, len(np.unique(batch.group)), batch.repeated)
        return _decode(table, batch, np.diff(bounds), composition)

    def _read(self, shard: np.ndarray, run: np.ndarray, row: np.ndarray) -> pa.Table:
        """The rows (shard[i], run[i], row[i]), in order."""
        keys, which = np.unique(np.stack([shard, run]), axis=1, return_inverse=True)
        batches: list[pa.RecordBatch] = [None] * keys.shape[1]
        spent = 0
        for number in np.unique(keys[0]).tolist():
            here = np.flatnonzero(keys[0] == number)
            if self._cache is not None:
                for position in here:
                    batches[position] = self._cache.get((number, int(keys[1, position])))
                here = np.array([position for position in here if batches[position] is None], dtype=np.int64)
            runs = keys[1, here]
            spent += int(np.sum(self._reader.run_bytes(number, runs, self._vectors))) if len(runs) else 0
            for position, batch in zip(here, self._reader.read_runs(number, runs, self._vectors), strict=True):
                batches[position] = batch
                if self._cache is not None:
                    self._cache.put((number, int(keys[1, position])), batch)
        with self._lock:
            self.bytes_read += spent
            self._largest = max(self._largest, sum(batch.nbytes for batch in batches))
        starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])])
        schema = batches[0].schema if batches else self._reader.schema
        return pa.Table.from_batches(batches, schema=schema).take(pa.array(starts[which.reshape(-1)] + row))


class _RunCache:
    """Decoded runs, the least recently used leave first; safe for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._runs: OrderedDict[tuple[int, int], pa.RecordBatch] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> pa.RecordBatch | None:
        with self._lock:
            if key in self._runs:
                self._runs.move_to_end(key)
            return self._runs.get(key)

    def put(self, key: tuple[int, int], batch: pa.RecordBatch) -> None:
        with self._lock:
            if key not in self._runs:
                self._bytes += batch.nbytes
            self._runs[key] = batch
            while self._bytes > self._limit and len(self._runs) > 1:
                _, evicted = self._runs.popitem(last=False)
                self._bytes -= evicted.nbytes


def _decode(table: pa.Table, batch: GlobalBatch, slice_rows: np.ndarray, composition: Composition) -> SliceBatch:
    columns: dict[str, Any] = {name: table[name].combine_chunks() for name in table.column_names}
    negative_tokens = negative_counts = None
    if "negative_tokens" in columns:
        column = columns["negative_tokens"]
        negative_counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        negative_tokens = Tokens.from_arrow(column.flatten())
    return SliceBatch(
        step=batch.step,
        epoch=batch.epoch,
        query_tokens=Tokens.from_arrow(columns["query_tokens"]),
        document_tokens=Tokens.from_arrow(columns["document_tokens"]),
        query_hash=columns["query_hash"].to_numpy(),
        document_hash=columns["document_hash"].to_numpy(),
        weight=columns["weight"].to_numpy() if "weight" in columns else None,
        negative_tokens=negative_tokens,
        negative_counts=negative_counts,
        query_vector=_matrix(columns.get("query_vector")),
        document_vector=_matrix(columns.get("document_vector")),
        slice_rows=slice_rows.astype(np.int64),
        composition=composition,
    )


def _matrix(column: pa.FixedSizeListArray | None) -> np.ndarray | None:
    if column is None:
        return None
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
