"""One worker's part of every batch, read ahead: runs by byte range, decoded off the training thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.batches.curriculum import Plan
from clusterbatch.batches.negatives import NegativeChoice, filtered
from clusterbatch.batches.plan import GlobalBatch
from clusterbatch.batches.row_reader import RowReader
from clusterbatch.encoder.images import ImageProcessor, Pixels
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.shards.reader import ShardReader

_FETCHERS = 4
_MOST_AHEAD = 16


@dataclass(frozen=True)
class Composition:
    """Composition of a global batch, for metrics and reports.

    stratum: the source's name, or the name of a pool of several; purity: share of rows from the main cluster; groups:
    how many of the strategy's groups the rows come from; packed: share of rows that remained of their group; repeated:
    rows that this epoch has already seen.
    """

    stratum: str
    purity: float
    groups: int
    packed: float
    repeated: int

    @staticmethod
    def of(batch: GlobalBatch) -> Composition:
        groups = len(np.unique(batch.group))
        return Composition(batch.stratum.name, batch.purity, groups, float(batch.packed.mean()), batch.repeated)


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's scores of n rows.

    positive: (n,) float32, of the rows' own documents; counts: (n,) how many others each row has; document (sum,)
    uint64 and score (sum,) float32: hashes of these and their scores, row by row, the best first; negative_hash: hashes
    of all hard negatives of the rows, None if the data has none.
    """

    positive: np.ndarray
    counts: np.ndarray
    document: np.ndarray
    score: np.ndarray
    negative_hash: np.ndarray | None = None


@dataclass(frozen=True)
class SliceBatch:
    """The rows of one rank in the global batch of `step`; n of them. Slices follow each other in rank order.

    Images have pixels instead of tokens. negative_tokens holds all hard negatives of row 0, then of row 1, ...;
    negative_counts (n,) says how many each has, negative_margins (all of them,) float32 how far the surrogate scores
    each below its row's document, NaN if it did not. slice_rows: (world_size,) int64, the rows of every rank.
    query_vector, document_vector: (n, m), as stored. document_id_hash: (n,), None if rows do not say of which document
    they are a part. teacher: None unless the shards are read with scores. mode: (n,) uint8 (negatives.py), None if all
    rows train with all negatives. duplicate_group: (n,), equal in rows that are semantic duplicates, None if none were
    looked for.
    """

    step: int
    epoch: int
    query_tokens: Tokens | Pixels
    document_tokens: Tokens | Pixels
    query_hash: np.ndarray
    document_hash: np.ndarray
    weight: np.ndarray | None
    negative_tokens: Tokens | Pixels | None
    negative_counts: np.ndarray | None
    query_vector: np.ndarray | None
    document_vector: np.ndarray | None
    slice_rows: np.ndarray
    composition: Composition
    negative_margins: np.ndarray | None = None
    document_id_hash: np.ndarray | None = None
    teacher: TeacherScores | None = None
    mode: np.ndarray | None = None
    duplicate_group: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.query_tokens)


class SliceLoader:
    """Iterate over the slices of `rank` for steps [first_step, last_step), in order.

    At most `prefetch_bytes` of decoded runs are read ahead, never less than one batch. If the plan moves single rows
    (a strategy on a layout not made for it), decoded runs are kept up to `cache_bytes`: they are needed again soon.
    `images` decodes them; without it they stay as they are stored, one byte for a token. negatives: which of the hard
    negatives are used; None: all.
    `wait_seconds` is the time that the consumer waited, `bytes_read` the bytes that came from storage.
    """

    def __init__(
        self,
        plan: Plan,
        reader: ShardReader,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        *,
        vectors: bool = False,
        prefetch_bytes: int = 64 * 2**20,
        cache_bytes: int = 256 * 2**20,
        images: ImageProcessor | None = None,
        negatives: NegativeChoice | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        self._plan, self._plan_lock = plan, threading.Lock()
        self._rank, self._world_size = rank, world_size
        self._steps = range(first_step, last_step)
        self._prefetch_bytes = prefetch_bytes
        self._rows = RowReader(reader, vectors=vectors, cache_bytes=cache_bytes if plan.moves_rows else None)
        self._images, self._largest_pixels = images, 0
        self._negatives = negatives
        self.wait_seconds = 0.0

    @property
    def bytes_read(self) -> int:
        return self._rows.bytes_read

    def __iter__(self) -> Iterator[SliceBatch]:
        pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="slice-loader")
        ahead: deque[Future[SliceBatch]] = deque()
        steps = iter(self._steps)

        def read_ahead() -> None:
            while len(ahead) < self._allowed_ahead() and (step := next(steps, None)) is not None:
                ahead.append(pool.submit(self._fetch, step))

        try:
            read_ahead()
            while ahead:
                start = time.perf_counter()
                batch = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                # Before the consumer gets its batch, so that the next ones are read while it trains.
                read_ahead()
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _allowed_ahead(self) -> int:
        if not self._rows.largest:
            return 2
        return max(1, min(_MOST_AHEAD, self._prefetch_bytes // (self._rows.largest + self._largest_pixels)))

    def _fetch(self, step: int) -> SliceBatch:
        index = self._plan.index
        # The plan keeps small caches, so one thread at a time asks it.
        with self._plan_lock:
            batch = self._plan.batch(step)
        bounds = batch.slice_bounds(self._world_size, index.run_rows)
        mine = slice(bounds[self._rank], bounds[self._rank + 1])
        piece, row = batch.piece[mine], batch.row[mine]
        run = index.first_run[piece] + row // index.run_rows
        table = self._rows.read(index.shard[piece], run, row % index.run_rows)
        decoded = _decode(table, batch, np.diff(bounds), self._images, index.source[piece], self._negatives)
        kinds = (decoded.query_tokens, decoded.document_tokens, decoded.negative_tokens)
        pixels = sum(kind.values.nbytes for kind in kinds if isinstance(kind, Pixels))
        self._largest_pixels = max(self._largest_pixels, pixels)
        return decoded


def _decode(
    table: pa.Table,
    batch: GlobalBatch,
    slice_rows: np.ndarray,
    images: ImageProcessor | None,
    source: np.ndarray,
    negatives: NegativeChoice | None,
) -> SliceBatch:
    columns: dict[str, Any] = {name: table[name].combine_chunks() for name in table.column_names}
    if negatives is not None:
        _choose_negatives(columns, source, negatives)
    negative_tokens = negative_counts = None
    column = columns.get("negative_image", columns.get("negative_tokens"))
    if column is not None:
        negative_counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        negative_tokens = _inputs(column.flatten(), images)
    return SliceBatch(
        step=batch.step,
        epoch=batch.epoch,
        query_tokens=_inputs(columns.get("query_image", columns.get("query_tokens")), images),
        document_tokens=_inputs(columns.get("document_image", columns.get("document_tokens")), images),
        query_hash=columns["query_hash"].to_numpy(),
        document_hash=columns["document_hash"].to_numpy(),
        weight=columns["weight"].to_numpy() if "weight" in columns else None,
        negative_tokens=negative_tokens,
        negative_counts=negative_counts,
        query_vector=_matrix(columns.get("query_vector")),
        document_vector=_matrix(columns.get("document_vector")),
        slice_rows=slice_rows.astype(np.int64),
        composition=Composition.of(batch),
        negative_margins=_floats(columns.get("negative_margins")),
        document_id_hash=columns["document_id_hash"].to_numpy() if "document_id_hash" in columns else None,
        teacher=_teacher(columns) if "teacher_positive" in columns else None,
        duplicate_group=columns["duplicate_group"].to_numpy() if "duplicate_group" in columns else None,
        mode=None if negatives is None else negatives.mode[source],
    )


def _teacher(columns: dict[str, Any]) -> TeacherScores:
    negatives = columns.get("negative_text_hash")
    return TeacherScores(
        columns["teacher_positive"].to_numpy(),
        np.diff(columns["teacher_document"].offsets.to_numpy()),
        columns["teacher_document"].flatten().to_numpy(),
        columns["teacher_score"].flatten().to_numpy(),
        None if negatives is None else negatives.flatten().to_numpy(),
    )


def _choose_negatives(columns: dict[str, Any], source: np.ndarray, negatives: NegativeChoice) -> None:
    """Leave out of `columns`, in place, the hard negatives that are not used."""
    # Each is a list of one item for each negative of the row.
    names = [name for name in columns if name.startswith("negative_")]
    if not names:
        return
    counts = columns[names[0]].value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    score = columns["score"].to_numpy() if "score" in columns else None
    kept = negatives.kept(source, counts, score, _floats(columns.get("negative_scores")))
    for name in names:
        if kept is None:
            del columns[name]
        else:
            columns[name] = filtered(columns[name], kept)


def _inputs(column: pa.Array, images: ImageProcessor | None) -> Tokens | Pixels:
    if not pa.types.is_binary(column.type):
        return Tokens.from_arrow(column)
    encoded = column.to_pylist()
    if images is not None:
        return images.pixels(encoded)
    return Tokens.from_lists([np.frombuffer(image, np.uint8) for image in encoded], np.uint8)


def _floats(column: pa.ListArray | None) -> np.ndarray | None:
    return None if column is None else column.flatten().to_numpy(zero_copy_only=False)


def _matrix(column: pa.FixedSizeListArray | None) -> np.ndarray | None:
    if column is None:
        return None
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
