"""The batch plan over a Dataset of the user's own: same-cluster batches without giving up one's training code.

A map-style dataset and one label per row are all it takes; labels come from the user or from a workspace that has been
clustered (`label_rows`). The promises are the plan's: every row at least once an epoch, no row twice in a batch, a
batch is of one cluster or of neighbouring remains, never of two sources, any step is addressed directly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.distributed
from torch.utils.data import BatchSampler, Sampler, SequentialSampler

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.config import BatchesConfig, fingerprint
from clusterbatch.errors import DataError, UsageError
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.reader import ROWS, read_index
from clusterbatch.store import Artifact
from clusterbatch.store.checksum import checksum
from clusterbatch.store.tables import read_parquet

Labels = Sequence[Any] | np.ndarray

# Unit vectors, rounded.
_LONGEST = 1.01
_ASKS_TO_EVALUATE = ("get_eval_dataloader", "get_test_dataloader")


class ClusterBatchSampler(Sampler[list[int]]):
    """Row numbers of one rank's slice of each global batch, for `DataLoader(dataset, batch_sampler=...)`.

    Each process of a group makes one with its own `rank`; all slices of a step come from the same global batch, and
    gathering negatives over ranks gives each query all of them. Call `set_epoch` before each epoch, as with PyTorch's
    DistributedSampler; `resume` starts in the middle of one. The loader is the rank's own: accelerate's `prepare` would
    divide its batches among the ranks once more.
    """

    def __init__(
        self,
        clusters: Labels,
        config: BatchesConfig,
        *,
        sources: Labels | None = None,
        vectors: tuple[np.ndarray, np.ndarray] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """clusters, sources: (N,) integers or strings, one per row of the dataset; clusters next to each other in
        sorted order count as neighbours. vectors: (N, m) unit vectors of the queries and of the documents, which
        `config.super_batch` needs. `config.size` is the global batch, over all ranks.

        Raises UsageError if labels and configuration make no plan.
        """
        super().__init__()
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of {world_size}")
        if world_size > config.size:
            raise UsageError(
                f"batches.size: a batch of {config.size} pairs leaves some of {world_size} ranks without any"
            )
        if config.largest_super_batch > 1 and vectors is None:
            raise UsageError("batches.super_batch: a sampler divides super-batches by `vectors`, which are not given")
        for each in vectors or ():
            if each.ndim != 2 or len(each) != len(clusters):
                raise UsageError(f"vectors: of shape {each.shape}, expected one for each of {len(clusters)} rows")
            if not (np.linalg.norm(each, axis=1) < _LONGEST).all():
                raise UsageError("vectors: longer than 1, or no numbers; divide each by its length")
        if vectors and vectors[0].shape != vectors[1].shape:
            raise UsageError(f"vectors: {vectors[0].shape[1]} and {vectors[1].shape[1]} dimensions, expected as many")
        index, self._row_of = index_labels(clusters, sources)
        if config.largest_super_batch > 1 and vectors:
            # They decide which rows meet, as labels do.
            parts = [index.fingerprint, *(checksum(np.ascontiguousarray(each).data) for each in vectors)]
            index = replace(index, fingerprint=fingerprint(*parts))

        def vectors_of(piece: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            assert vectors is not None
            rows = self._row_of[index.first_row[piece] + row]
            return vectors[0][rows], vectors[1][rows]

        self.plan = make_plan(index, config, "group" if config.stratify == "group" else "cluster", vectors_of)
        self._rank, self._world_size = rank, world_size
        self.epoch, self._first = 0, 0

    def __len__(self) -> int:
        """Batches of the whole epoch."""
        return len(self.steps)

    @property
    def steps(self) -> range:
        """Steps of the epoch, counted from the beginning of training."""
        return range(self.plan.steps_of(self.epoch), self.plan.steps_of(self.epoch + 1))

    def __iter__(self) -> Iterator[list[int]]:
        first, self._first = self._first, 0
        for step in self.steps[first:]:
            yield self.slices(step, self._world_size)[self._rank]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, which begins at its first batch unless it is the one resumed in."""
        if epoch != self.epoch:
            self.epoch, self._first = epoch, 0

    def state(self, step: int) -> dict[str, Any]:
        """Return the state to keep with a checkpoint after `step` steps of training (all epochs), as plain JSON values.

        The trainer counts, not the sampler: a DataLoader with workers is ahead of what has been trained.
        """
        return {"plan": self.plan.fingerprint, "step": step}

    def resume(self, state: dict[str, Any]) -> int:
        """Begin the next iteration with the batch after `state`'s; return its epoch.

        With another number of ranks the same global batches follow. Raises UsageError if the state is of another plan.
        """
        if state["plan"] != self.plan.fingerprint:
            raise UsageError("this checkpoint was made with other labels, vectors, batch size, strategy or seed")
        self.epoch, self._first = self.plan.locate(state["step"])
        return self.epoch

    def slices(self, step: int, count: int) -> list[list[int]]:
        """Return the rows of global batch `step`, in `count` slices whose sizes differ by at most one."""
        batch = self.plan.batch(step)
        rows = self._row_of[self.plan.index.first_row[batch.piece] + batch.row]
        bounds = batch.slice_bounds(count, self.plan.index.run_rows)
        return [part.tolist() for part in np.split(rows, bounds[1:-1])]


class DeviceBatchSampler(Sampler[list[int]]):
    """Batch sampler for Sentence Transformers' trainer: batches for one device each, the same on every process.

    Sentence Transformers gives process p of W the batches p, p + W, p + 2W, ... With an ordinary sampler the negatives
    that `gather_across_devices` collects are then of W unrelated batches, and the fewer of them hard the more GPUs
    there are. Here W consecutive batches are the slices of one global batch of W x batch_size rows, so that what is
    gathered is of one cluster again. If the trainer is given a dataset per rank, or losses do not gather, every rank
    has in-batch negatives from its own slice only.
    """

    def __init__(self, sampler: ClusterBatchSampler, devices: int) -> None:
        super().__init__()
        self._sampler, self._devices = sampler, devices
        self.batch_size = sampler.plan.config.size // devices
        # Last batches are completed by the plan.
        self.drop_last = True

    @property
    def sampler(self) -> DeviceBatchSampler:
        """The sampler itself: accelerate looks for set_epoch here if it wraps a batch sampler for several processes."""
        return self

    def __len__(self) -> int:
        return len(self._sampler) * self._devices

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._sampler.steps:
            yield from self._sampler.slices(step, self._devices)

    def set_epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)


class SentenceTransformersSampler:
    """Same-cluster batches of the training dataset, for `SentenceTransformerTrainingArguments(batch_sampler=...)`.

    Use a loss with in-batch negatives; with several GPUs, one with `gather_across_devices=True`. Resuming from a
    checkpoint works as usual: the trainer skips batches, which reads nothing. Datasets to evaluate on need no labels.
    (A class, because the trainer pickles its arguments into every checkpoint; labels and vectors go with them.)
    """

    def __init__(
        self,
        clusters: Labels,
        *,
        sources: Labels | None = None,
        vectors: tuple[np.ndarray, np.ndarray] | None = None,
        devices: int | None = None,
        **batches: Any,
    ) -> None:
        """clusters, sources: one label per row of `train_dataset`; vectors: as for ClusterBatchSampler. devices:
        processes that share a global batch; unset: those of torch.distributed. `batches`: further keys of the section
        batches (stratify, clusters_per_batch, super_batch, small_sources, source_weights); size and seed come from the
        trainer.
        """
        known = BatchesConfig.model_fields.keys() - {"size", "seed"}
        for name in sorted(batches.keys() - known):
            raise UsageError(f"{name}: not a key that a sampler takes (it takes {', '.join(sorted(known))})")
        self._clusters, self._sources = np.asarray(clusters), None if sources is None else np.asarray(sources)
        self._vectors, self._devices, self._batches = vectors, devices, batches

    def __call__(
        self, dataset: Any, batch_size: int, drop_last: bool = False, seed: int = 0, **_: Any
    ) -> DeviceBatchSampler | BatchSampler:
        """Return the batches of `dataset`; the trainer calls it. The plan needs no generator and drops nothing.

        A dataset to evaluate on has no labels, and comes in its own order. Raises UsageError if the training dataset
        has another number of rows than labels.
        """
        if _is_to_evaluate():
            return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)
        if len(dataset) != len(self._clusters):
            raise UsageError(f"{len(self._clusters)} cluster labels for a training dataset of {len(dataset)} rows")
        devices = self._devices
        if devices is None:
            devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        config = BatchesConfig(size=batch_size * devices, seed=seed, **self._batches)
        sampler = ClusterBatchSampler(self._clusters, config, sources=self._sources, vectors=self._vectors)
        return DeviceBatchSampler(sampler, devices)


def _is_to_evaluate() -> bool:
    """Return whether a trainer asks for a dataset to evaluate on.

    It passes the same arguments for all datasets; only the method that asks, of transformers' Trainer, tells them
    apart.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name not in _ASKS_TO_EVALUATE:
        if frame.f_code.co_name == "get_train_dataloader":
            return False
        frame = frame.f_back
    return frame is not None


def index_labels(clusters: Labels, sources: Labels | None = None) -> tuple[ClusterIndex, np.ndarray]:
    """Return a cluster index over labels, and (N,) int64: the row of the dataset that each row of the index is."""
    one_source = np.full(len(clusters), "dataset")
    names, source = _numbered("sources", one_source if sources is None else sources)
    labels, cluster = _numbered("clusters", clusters)
    if not len(source) == len(cluster) > 0:
        raise UsageError(f"labels: {len(cluster)} clusters and {len(source)} sources, expected one of each per row")
    order = np.lexsort((cluster, source))
    key = source[order].astype(np.int64) * len(labels) + cluster[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    source_of_cluster = source[order][starts]
    index = ClusterIndex(
        sources=[str(name) for name in names],
        source=source_of_cluster.astype(np.int32),
        # Numbered inside each source, without gaps: `merged_clusters` counts neighbours by these numbers.
        cluster=(np.arange(len(starts)) - np.searchsorted(source_of_cluster, source_of_cluster)).astype(np.int32),
        rows=np.diff(starts, append=len(key)),
        shard=np.zeros(len(starts), np.int32),
        first_run=starts,
        first_row=starts,
        # Rows of a dataset in memory are read one by one.
        run_rows=1,
        fingerprint=checksum(np.stack([source, cluster]).astype(np.int64).tobytes()),
    )
    return index, order


def _numbered(name: str, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct labels in sorted order, and (N,) int64, which of them each row has."""
    values = np.asarray(labels)
    if values.ndim != 1:
        raise UsageError(f"{name}: labels of shape {values.shape}, expected one per row")
    problem = UsageError(f"{name}: expected integers or strings, not a mixture, and none missing")
    try:
        # NaN, as which pandas has a missing label, is the one value that differs from itself.
        if values.dtype.kind not in "iubUS" and np.any(values != values):
            raise problem
        return np.unique(values, return_inverse=True)
    except TypeError:
        raise problem from None


def label_rows(clusters: Artifact, pair_ids: Sequence[str] | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources (N,) and cluster numbers (N,) of rows of a clustered workspace, by their pair_ids.

    pair_ids: one per row. Take `Workspace(config).clusters()` for `clusters`. Numbers of one source follow its packing
    order. Raises DataError if a row is not in the clusters: it was rejected, or is a duplicate of another.
    """
    manifest = clusters.require()
    index = read_index(clusters, manifest)
    known, entries = [], []
    for part in manifest.parts:
        if part.details.get("content") != ROWS:
            continue
        known.append(read_parquet(clusters.folder, part, ["pair_id"])["pair_id"])
        here = np.flatnonzero(index.shard == part.details["shard"])
        here = here[np.argsort(index.first_row[here])]
        entries.append(np.repeat(here, index.rows[here]))
    value_set = pa.chunked_array([chunk for column in known for chunk in column.chunks], pa.string())
    wanted = pa.array(pair_ids, pa.string())
    found = pc.index_in(wanted, value_set=value_set)
    if found.null_count:
        first = pc.filter(wanted, pc.is_null(found))[0].as_py()
        raise DataError(f"{clusters.folder.uri}: {found.null_count} of {len(found)} rows are not there, as {first!r}")
    entry = np.concatenate(entries)[found.to_numpy()]
    return np.asarray(index.sources)[index.source[entry]], index.cluster[entry]
