"""Fits whose sample is too large for one process: workers hold chunks, centroids go out, sums come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import ray
import torch

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.cell_fit import CellFit, FitLevel
from clusterbatch.clustering.features import project
from clusterbatch.clustering.model import write_fits
from clusterbatch.clustering.partial_sums import (
    Centers,
    Chunk,
    PartialSums,
    chunk_sums,
    chunks_head,
    is_weightless,
    merge,
)
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.errors import InfrastructureError, first_line
from clusterbatch.runtime import Pool, Result, check_resources
from clusterbatch.store import Artifact, Counts

# Samples larger than this are spread over the workers; smaller ones are fitted whole, side by side.
LOCAL_BYTES = 256 * 2**20

# How often the sums of a chunk are tried if the worker dies of them.
_TRIES = 3

DtypeName = Literal["auto", "float32", "bfloat16"]


def fit_distributed(level: FitLevel, cell: int, output: Artifact, pool: Pool) -> Result:
    """Fit one cell by all workers of the pool; the result is the same, bit for bit, as that of `FitWorker`.

    Raises InfrastructureError if a worker is lost again and again.
    """
    level = replace(level, sample=countable(level, cell))
    matrix = CellFit(level, cell).projection(CellFit(level, cell).chunks())
    rows = RemoteRows(level.sample, level.cells.buckets_of(cell), matrix, pool, level.device)
    try:
        # The driver multiplies nothing, and may see no GPU to tell the number format of the workers' products by.
        config = level.config.model_copy(update={"dtype": rows.dtype(level.config.dtype)})
        fit = CellFit(replace(level, device="cpu", config=config), cell)
        fits = fit.table(fit.fit(rows, matrix, fit.sampled()), matrix)
        fitted = sum(rows.chunk_rows)
        return Result(write_fits(output, cell, fits), Counts(read=fitted, written=fitted))
    except ray.exceptions.RayActorError as error:
        reason = first_line(error)
        raise InfrastructureError(f"fit: unit {cell} lost its worker in each of {_TRIES} tries ({reason})") from error
    finally:
        rows.close()


def countable(level: FitLevel, cell: int) -> SampleChunks:
    """Return the sample, without weights if all those of the cell are 0: its rows then count by their number."""
    weightless = is_weightless(CellFit(level, cell).chunks())
    return replace(level.sample, weighted=False) if weightless else level.sample


class RemoteRows:
    """Chunks dealt out to a fixed pool of actors. An actor that dies is replaced and reads its chunks again."""

    def __init__(
        self, sample: SampleChunks, buckets: Sequence[int], matrix: np.ndarray | None, pool: Pool, device: str
    ) -> None:
        self._sample, self._matrix = sample, matrix
        actor = ray.remote(_ChunkHolder).options(
            num_cpus=pool.cpus, num_gpus=pool.gpus or None, max_restarts=-1, max_task_retries=_TRIES - 1
        )
        workers = min(pool.workers, len(buckets))
        check_resources("fit", workers, pool)
        self.actors = [actor.remote(sample, matrix, device) for _ in range(workers)]
        # Dealt one by one: neighbouring chunks, which make a mini-batch, belong to different workers.
        dealt = [(self.actors[index % workers], bucket) for index, bucket in enumerate(buckets)]
        rows = ray.get([holder.count.remote(bucket) for holder, bucket in dealt])
        self._filled = [place for place, count in zip(dealt, rows, strict=True) if count]
        self.chunk_rows = [count for count in rows if count]
        self._round = 0

    def dtype(self, name: DtypeName) -> DtypeName:
        """Resolve 'auto' on a worker, by the hardware that makes the products."""
        answer: DtypeName = ray.get(self.actors[0].dtype.remote(name))
        return answer

    def head(self, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        return chunks_head((_read(self._sample, bucket, self._matrix) for _, bucket in self._filled), count)

    def partial_sums(self, centers: Centers, chunks: Sequence[int], dtype: torch.dtype) -> PartialSums:
        # Once to the object store; each node fetches it from there once.
        reference = ray.put(centers)
        self._round += 1
        filled = [self._filled[chunk] for chunk in chunks]
        answers = [holder.sums.remote(self._round, reference, bucket, dtype) for holder, bucket in filled]
        return merge(ray.get(answer) for answer in answers)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


class _ChunkHolder:
    """Actor that reads its chunks when they are first asked for, so that a replacement of a lost one works at once."""

    def __init__(self, sample: SampleChunks, matrix: np.ndarray | None, device: str) -> None:
        torch.set_num_threads(1)
        self._sample, self._matrix, self._device = sample, matrix, device
        self._chunks: dict[int, Chunk] = {}
        self._assigner: tuple[int, Assigner] | None = None

    def dtype(self, name: DtypeName) -> DtypeName:
        bfloat16 = inference_dtype(name, resolve_device(self._device)) == torch.bfloat16
        return "bfloat16" if bfloat16 else "float32"

    def count(self, bucket: int) -> int:
        return len(self._chunk(bucket)[0])

    def sums(self, round_number: int, centers: Centers, bucket: int, dtype: torch.dtype) -> PartialSums:
        if self._assigner is None or self._assigner[0] != round_number:
            # Laid out once a round, not once a chunk.
            assigner = Assigner(centers.centroids, centers.bias, dtype=dtype, device=self._device)
            self._assigner = (round_number, assigner)
        return chunk_sums(self._assigner[1], *self._chunk(bucket))

    def _chunk(self, bucket: int) -> Chunk:
        if bucket not in self._chunks:
            self._chunks[bucket] = _read(self._sample, bucket, self._matrix)
        return self._chunks[bucket]


def _read(sample: SampleChunks, bucket: int, matrix: np.ndarray | None) -> Chunk:
    vectors, weights = sample.read(bucket)
    return (project(vectors, matrix) if len(vectors) else vectors), weights
