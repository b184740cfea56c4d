"""The batch plan: what stands in the global batch of step t. A pure function of the cluster index, the strategy, the
seed, the batch size and t; it has no state, no clock, and knows nothing of how many workers there are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from clusterbatch.batches.permutation import permute
from clusterbatch.batches.sequence import EpochSequence
from clusterbatch.batches.strata import Stratum, build_strata
from clusterbatch.clustering.index import ClusterIndex
from clusterbatch.config import BatchesConfig, fingerprint

# Raised whenever the same index and configuration would give other batches: old checkpoints then do not resume.
PLAN_VERSION = 1
_ORDER = 7


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step over all ranks, in order.

    piece: (B,) entries of the cluster index; row: (B,) row inside the piece; group: (B,) group inside the stratum.
    repeated: rows at the end that this epoch has already seen (a source's last batch is filled up).
    """

    step: int
    epoch: int
    stratum: Stratum
    piece: np.ndarray
    row: np.ndarray
    group: np.ndarray
    repeated: int

    def __len__(self) -> int:
        return len(self.piece)

    @property
    def purity(self) -> float:
        """The share of rows from the most frequent group."""
        return float(np.unique(self.group, return_counts=True)[1].max() / len(self))

    def slice_bounds(self, world_size: int, run_rows: int) -> np.ndarray:
        """(world_size + 1,) row positions: rank r has rows [bounds[r], bounds[r + 1]).

        Equal shares, moved by at most a quarter of a run to where a run ends, so that two ranks seldom read the same
        run; two slices then differ by at most one run.
        """
        exact = np.arange(world_size + 1) * len(self) // world_size
        if len(self) < world_size * run_rows:
            return exact
        run = self.row // run_rows
        ends = np.flatnonzero((np.diff(self.piece) != 0) | (np.diff(run) != 0)) + 1
        ends = np.concatenate([[0], ends, [len(self)]])
        after = np.searchsorted(ends, exact)
        before = np.maximum(after - 1, 0)
        nearest = np.where(exact - ends[before] < ends[after] - exact, ends[before], ends[after])
        return np.where(np.abs(nearest - exact) <= run_rows // 4, nearest, exact)


class BatchPlan:
    """`plan.batch(step)` for any step, in time that depends on the batch size and the logarithm of the clusters.

    Every row comes at least once an epoch, and at most batch - 1 rows of a source come twice in it; no row comes twice
    in one batch. With `source_weights` each source instead cycles through all its rows at its own pace.
    """

    def __init__(self, index: ClusterIndex, config: BatchesConfig, layout: str = "cluster") -> None:
        """`layout`: by what the shards are grouped (cluster, source or random). Raises UsageError, see build_strata."""
        self.index = index
        self.config = config
        self.layout = layout
        self.strata, self.left_out = build_strata(index, config, layout)
        self.fingerprint = fingerprint("plan", PLAN_VERSION, config, layout, index.fingerprint)
        self.batches_of_stratum = np.array([-(-stratum.rows // config.size) for stratum in self.strata])
        self._quota_end = np.cumsum(self._quotas())
        self._largest = max(self.strata, key=lambda stratum: stratum.rows)
        self._sequences: OrderedDict[tuple[int, int], EpochSequence] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        return int(self._quota_end[-1])

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step inside it) of a step counted from the beginning of training."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of step `step` (counted from 0 through all epochs)."""
        epoch, inside = self.locate(step)
        slot = int(permute(np.array([inside]), self.steps_per_epoch, self.config.seed, epoch, _ORDER)[0])
        number = int(np.searchsorted(self._quota_end, slot, side="right"))
        quota_start = int(self._quota_end[number - 1]) if number else 0
        quota = int(self._quota_end[number]) - quota_start
        # How many batches of this stratum came in earlier epochs and, in the order of slots, in this one.
        ordinal = epoch * quota + slot - quota_start
        own_epoch, local = divmod(ordinal, int(self.batches_of_stratum[number]))
        return self._assemble(step, epoch, self.strata[number], own_epoch, local)

    def sequence(self, stratum: Stratum, epoch: int) -> EpochSequence:
        """The order of a stratum's rows in one of its epochs; a few are kept, for steps alternate between strata."""
        key = (stratum.number, epoch)
        if key not in self._sequences:
            part_rows = self.config.size // stratum.groups_per_batch
            self._sequences[key] = EpochSequence(stratum, part_rows, self.config.seed, epoch)
            if len(self._sequences) > 2 * len(self.strata) + 2:
                self._sequences.popitem(last=False)
        self._sequences.move_to_end(key)
        return self._sequences[key]

    def _assemble(self, step: int, epoch: int, stratum: Stratum, own_epoch: int, local: int) -> GlobalBatch:
        size = self.config.size
        start, end = local * size, min((local + 1) * size, stratum.rows)
        blocks = [self.sequence(stratum, own_epoch).rows(start, end)]
        missing = size - (end - start)
        if missing:
            # The beginning of the same epoch is disjoint from its end; only a pool smaller than a batch must borrow.
            lender = stratum if stratum.rows >= size else self._largest
            piece, row, group = self.sequence(lender, own_epoch).rows(0, missing)
            blocks.append((piece, row, group if lender is stratum else -1 - group))
        piece, row, group = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
        return GlobalBatch(step, epoch, stratum, piece, row, group, missing)

    def _quotas(self) -> np.ndarray:
        """Batches of each stratum in an epoch: all of its own, or shares by weight (largest remainder)."""
        weights = self.config.source_weights
        if not weights:
            return self.batches_of_stratum
        factor = np.array([np.mean([weights.get(name, 1.0) for name in stratum.sources]) for stratum in self.strata])
        share = self.batches_of_stratum * factor
        exact = share / share.sum() * self.batches_of_stratum.sum()
        quotas = np.floor(exact).astype(np.int64)
        remaining = int(self.batches_of_stratum.sum() - quotas.sum())
        quotas[np.argsort(quotas - exact, kind="stable")[:remaining]] += 1
        return quotas
