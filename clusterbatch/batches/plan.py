"""The batch plan: the rows of the global batch of step t.

A pure function of the cluster index, the strategy, the seed, the batch size and t. It has no state and no clock, and
does not depend on the number of workers.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from clusterbatch.batches.permutation import permute
from clusterbatch.batches.sequence import EpochSequence
from clusterbatch.batches.strata import Stratum, build_strata
from clusterbatch.config import BatchesConfig, fingerprint
from clusterbatch.shards.index import ClusterIndex

# Raised whenever the same index and configuration would give other batches: old checkpoints then do not resume.
PLAN_VERSION = 2
_ORDER, _BATCHES, _EXCHANGE = 7, 8, 10
# Of more strata than that each is small, and its order made in a millisecond.
_KEPT_SEQUENCES = 4096


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step over all ranks, in order; arrays are (B,).

    piece: entries of the cluster index; row: row inside the piece; cluster: number of the row's cluster through the
    index; group: number of the strategy's group inside the stratum; packed: bool, rows that remained of their group.
    repeated: how many rows at the end this epoch has already seen (a source's last batch is filled up).
    """

    step: int
    epoch: int
    stratum: Stratum
    piece: np.ndarray
    row: np.ndarray
    cluster: np.ndarray
    group: np.ndarray
    packed: np.ndarray
    repeated: int

    def __len__(self) -> int:
        return len(self.piece)

    @property
    def purity(self) -> float:
        """Share of rows from the most frequent cluster of the index, whatever the strategy."""
        return float(np.unique(self.cluster, return_counts=True)[1].max() / len(self))

    def slice_bounds(self, world_size: int, run_rows: int) -> np.ndarray:
        """Return (world_size + 1,) row positions: rank r has rows [bounds[r], bounds[r + 1]).

        Equal shares, each bound moved to the end of a run if one is near: two ranks then seldom read the same run,
        and no rank has much more to compute than another (all wait for the slowest). Two slices differ by at most one
        run.
        """
        exact = np.arange(world_size + 1) * len(self) // world_size
        reach = min(run_rows // 4, len(self) // (16 * world_size))
        run = self.row // run_rows
        ends = np.flatnonzero((np.diff(self.piece) != 0) | (np.diff(run) != 0)) + 1
        ends = np.concatenate([[0], ends, [len(self)]])
        after = np.searchsorted(ends, exact)
        before = np.maximum(after - 1, 0)
        nearest = np.where(exact - ends[before] < ends[after] - exact, ends[before], ends[after])
        return np.where(np.abs(nearest - exact) <= reach, nearest, exact)


class BatchPlan:
    """Plan of one phase: any step's batch, in time that depends on the batch size and the logarithm of the clusters.

    Every row comes at least once an epoch, and at most batch - 1 rows of a stratum come twice in it; no row comes twice
    in one batch. With `source_weights` each source instead cycles through all its rows at its own pace, and an epoch is
    about as many batches as without.

    With `uniform_clusters` the same holds for each cluster.

    With `random_share` whole batches of a stratum exchange that share of their rows among each other, by one
    permutation an epoch: so an epoch holds the same rows as without.
    """

    def __init__(
        self, index: ClusterIndex, config: BatchesConfig, layout: str = "cluster", first_epoch: int = 0
    ) -> None:
        """`layout`: what the shards are grouped by (cluster, group, source or random); first_epoch: the number of the
        epoch that step 0 begins, for orders that are not those of earlier ones. Raises UsageError.
        """
        assert not config.curriculum, "a plan is of one phase"
        self.index = index
        self.config = config
        self.layout = layout
        self.strata, self.left_out = build_strata(index, config, layout)
        # Plans that mix crowded clusters differ from those made before there was such mixing.
        mixing = ["mixed"] if any(stratum.mixed for stratum in self.strata) else []
        self.fingerprint = fingerprint("plan", PLAN_VERSION, config, layout, index.fingerprint, *mixing)
        self.first_epoch = first_epoch
        self.exchanged = round(config.random_share * config.size)
        self.batches_of_stratum = np.array([-(-stratum.rows // config.size) for stratum in self.strata])
        self.quotas = self._quotas()
        self._quota_end = np.cumsum(self.quotas)
        self._lender = max(self.strata, key=lambda stratum: stratum.rows)
        changes = (np.diff(index.source) != 0) | (np.diff(index.cluster) != 0)
        self._cluster_of_piece = np.concatenate([[0], np.cumsum(changes)])
        self._sequences: OrderedDict[tuple[int, int], EpochSequence] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        return int(self._quota_end[-1])

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step inside it) of a step counted from the beginning of training."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return self.first_epoch + epoch, inside

    def steps_of(self, epochs: int) -> int:
        """Return the steps of the first `epochs` epochs."""
        return epochs * self.steps_per_epoch

    @property
    def moves_rows(self) -> bool:
        """True if single rows move, so that a run is read for a few of its rows."""
        return self.exchanged > 0 or not all(stratum.whole_runs for stratum in self.strata)

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of step `step` (counted from 0 through all epochs)."""
        epoch, inside = self.locate(step)
        seed = self.config.seed
        slot = int(permute(np.array([inside]), self.steps_per_epoch, seed, epoch, _ORDER)[0])
        number = int(np.searchsorted(self._quota_end, slot, side="right"))
        quota = int(self.quotas[number])
        # How many batches of this stratum came in earlier epochs and, in the order of slots, in this one.
        ordinal = epoch * quota + slot - (int(self._quota_end[number]) - quota)
        batches = int(self.batches_of_stratum[number])
        own_epoch, local = divmod(ordinal, batches)
        # With weights an epoch sees only some of a stratum's batches; packed ones must not all come last.
        local = int(permute(np.array([local]), batches, seed, number, own_epoch, _BATCHES)[0])
        return self._assemble(step, epoch, self.strata[number], own_epoch, local)

    def sequence(self, stratum: Stratum, epoch: int) -> EpochSequence:
        """Return the order of a stratum's rows in one of its epochs. Some are kept: steps alternate between strata."""
        key = (stratum.number, epoch)
        if key not in self._sequences:
            self._sequences[key] = EpochSequence(stratum, self.part_rows(stratum), self.config.seed, epoch)
            if len(self._sequences) > min(2 * len(self.strata) + 2, _KEPT_SEQUENCES):
                self._sequences.popitem(last=False)
        self._sequences.move_to_end(key)
        return self._sequences[key]

    def part_rows(self, stratum: Stratum) -> int:
        """Return the rows that are dealt together: those of one group in a batch."""
        return self.config.size // stratum.groups_per_batch

    def filler(self, stratum: Stratum, own_epoch: int) -> tuple[Stratum, int]:
        """Return the stratum, and the position in its sequence, from which a short last batch is completed.

        None of those rows is in the batch already.
        """
        size = self.config.size
        if stratum.rows < size:
            # Only a pool can be smaller than a batch: it has to borrow.
            return self._lender, 0
        # The last batch ends the ring of remains: its neighbours are where the ring begins, if that is not the batch
        # itself. Otherwise the beginning of the sequence is disjoint from its end.
        ring = self.sequence(stratum, own_epoch).in_order_from
        return stratum, ring if stratum.rows - ring >= size else 0

    def _assemble(self, step: int, epoch: int, stratum: Stratum, own_epoch: int, local: int) -> GlobalBatch:
        size = self.config.size
        start, end = local * size, min((local + 1) * size, stratum.rows)
        sequence = self.sequence(stratum, own_epoch)
        missing = size - (end - start)
        own = 0 if missing else self.exchanged
        blocks = [sequence.rows(start, end - own)]
        if own:
            blocks.append(sequence.rows_at(self._exchanged(stratum, own_epoch, local)))
        if missing:
            lender, start = self.filler(stratum, own_epoch)
            piece, row, group, packed = self.sequence(lender, own_epoch).rows(start, start + missing)
            # Groups of another stratum get numbers of their own.
            blocks.append((piece, row, group if lender is stratum else -1 - group, packed))
        piece, row, group, packed = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
        if self.index.kept is not None:
            row = self.index.kept.rows(piece, row)
        return GlobalBatch(
            step, epoch, stratum, piece, row, self._cluster_of_piece[piece], group, packed, repeated=missing
        )

    def _exchanged(self, stratum: Stratum, own_epoch: int, local: int) -> np.ndarray:
        """Return (exchanged,) positions in the sequence that are at the end of whole batch `local`."""
        whole, own = stratum.rows // self.config.size, self.exchanged
        key = (self.config.seed, stratum.number, own_epoch, _EXCHANGE)
        place = permute(local * own + np.arange(own), whole * own, *key)
        return place // own * self.config.size + (self.config.size - own) + place % own

    def _quotas(self) -> np.ndarray:
        """Return (strata,) batches of each in an epoch: all of its own, or shares by weight, at least one."""
        weights, uniform = self.config.source_weights or {}, self.config.uniform_clusters
        if not weights and not uniform:
            return self.batches_of_stratum
        # A pool has the mean weight of its rows, for its batches mix its sources.
        weight_of_piece = np.array([weights.get(name, 1.0) for name in self.index.sources])[self.index.source]
        factors = [np.average(weight_of_piece[each.pieces], weights=each.piece_rows) for each in self.strata]
        clusters = np.array([each.clusters for each in self.strata])
        share = (clusters if uniform else self.batches_of_stratum) * np.array(factors)
        wanted = share / share.sum() * self.batches_of_stratum.sum()
        return np.maximum(1, np.round(wanted)).astype(np.int64)
