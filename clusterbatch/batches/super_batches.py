"""Super-batches: several batches of one source are drawn together, then divided so that near rows share a batch.

Legend: n rows of a super-batch, B rows of a batch, m dimensions of the surrogate's vectors.

In every epoch other rows meet, unlike those of a cluster, and no clusters are needed. Kin: the sub-batches of JEST
(Evans 2024, arXiv 2406.17711), which keeps the hardest of a super-batch; here every row stays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from clusterbatch.batches.permutation import permute
from clusterbatch.batches.plan import BatchPlan, GlobalBatch
from clusterbatch.batches.strata import Stratum
from clusterbatch.config import BatchesConfig
from clusterbatch.errors import UsageError
from clusterbatch.shards.index import ClusterIndex

# (n,) pieces of the cluster index and (n,) rows inside them -> (n, m) unit vectors of queries and of documents.
Vectors: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

_SUPER_BATCHES = 11
# Steps are read ahead by a few threads, which may be in different super-batches.
_KEPT = 4
# Components become whole numbers of this unit. Sums of their products stay below 2^24, whatever the order of the
# terms, so float32 holds them exactly: all ranks divide alike, on whatever processors they run.
_UNIT = 2.0**-10


class SuperBatchPlan(BatchPlan):
    """Plan of one phase whose batches are the parts of super-batches of `config.super_batch` batches.

    The promises of a BatchPlan hold: every row at least once an epoch, at most B - 1 rows of a stratum twice in it, no
    row twice in one batch, any step addressed directly. The parts of a super-batch are steps one after the other.
    """

    def __init__(
        self,
        index: ClusterIndex,
        config: BatchesConfig,
        layout: str = "cluster",
        first_epoch: int = 0,
        vectors: Vectors | None = None,
    ) -> None:
        """vectors: of the rows of the index; without them the plan knows its steps, but none of its batches."""
        super().__init__(index, config, layout, first_epoch)
        self._vectors = vectors
        batches = self.batches_of_stratum
        counts = -(-batches // config.super_batch)
        self._count_end = np.cumsum(counts)
        self._lengths = np.full(int(self._count_end[-1]), config.super_batch)
        self._lengths[self._count_end - 1] = batches - (counts - 1) * config.super_batch
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._divided: OrderedDict[tuple[int, int], list[GlobalBatch]] = OrderedDict()

    @property
    def moves_rows(self) -> bool:
        return True

    def part_rows(self, stratum: Stratum) -> int:
        """Return the rows that are dealt together: a super-batch reads whole runs, also if a batch has fewer rows."""
        return super().part_rows(stratum) * self.config.super_batch

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of step `step`. Raises UsageError if the plan has no vectors."""
        epoch, inside = self.locate(step)
        if epoch not in self._orders:
            order = permute(np.arange(len(self._lengths)), len(self._lengths), self.config.seed, epoch, _SUPER_BATCHES)
            _keep(self._orders, epoch, (order, np.cumsum(self._lengths[order])))
        order, ends = self._orders[epoch]
        place = int(np.searchsorted(ends, inside, side="right"))
        number = int(order[place])
        if (epoch, number) not in self._divided:
            _keep(self._divided, (epoch, number), self._super_batch(epoch, number))
        part = inside - int(ends[place] - self._lengths[number])
        return replace(self._divided[epoch, number][part], step=step)

    def _super_batch(self, epoch: int, number: int) -> list[GlobalBatch]:
        if self._vectors is None:
            raise UsageError("batches.super_batch: there are no vectors to divide a super-batch by")
        stratum = self.strata[int(np.searchsorted(self._count_end, number, side="right"))]
        size, local = self.config.size, number - int(self._count_end[stratum.number - 1] if stratum.number else 0)
        start = local * self.config.super_batch * size
        end = min(start + self.config.super_batch * size, stratum.rows)
        if end - start < size:
            # Too few rows for a batch: it is completed as in any plan.
            return [self._assemble(0, epoch, stratum, epoch, start // size)]
        piece, row, group, packed = self.sequence(stratum, epoch).rows(start, end)
        if self.index.kept is not None:
            row = self.index.kept.rows(piece, row)
        order = divide(*self._vectors(piece, row), size)
        missing = -len(order) % size
        found = []
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            if len(rows) < size:
                # The rows before them remained almost as long.
                rows = np.concatenate([rows, order[first - missing : first]])
            here = piece[rows]
            clusters = self._cluster_of_piece[here]
            repeated = missing if first + size > len(order) else 0
            found.append(GlobalBatch(0, epoch, stratum, here, row[rows], clusters, group[rows], packed[rows], repeated))
        return found


def divide(queries: np.ndarray, documents: np.ndarray, size: int) -> np.ndarray:
    """Return (n,) int64, the rows in an order in which each `size` of them are a batch; the last may be shorter.

    The first row that is left is joined by those whose query and document score highest with its own, crosswise: the
    sum of both cosines. queries, documents: (n, m) vectors of about unit length, any float type.
    """
    queries, documents = (np.rint(each.astype(np.float32) / _UNIT) for each in (queries, documents))
    left, found = np.arange(len(queries)), []
    while len(left) > size:
        first, others = left[0], left[1:]
        scores = (documents @ queries[first] + queries @ documents[first])[others]
        near = np.argsort(-scores, kind="stable")[: size - 1]
        found.append(np.concatenate([[first], others[near]]))
        left = np.delete(others, near)
    return np.concatenate([*found, left])


def _keep(cache: OrderedDict, key: object, value: object) -> None:  # type: ignore[type-arg]
    cache[key] = value
    if len(cache) > _KEPT:
        cache.popitem(last=False)
