"""Choice of the hard negatives that a row trains with, by its source (`train.negatives`, `train.filter`).

Shards keep every hard negative of the corpus and of mining, so another choice needs no new shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.config import TrainConfig
from clusterbatch.shards.index import ClusterIndex

# Candidates that compete with a row's document: those of the batch and all hard negatives in it; the batch's documents
# alone; the row's own hard negatives alone.
BOTH, IN_BATCH, HARD = 0, 1, 2
_MODES = {"both": BOTH, "in_batch": IN_BATCH, "hard": HARD}


@dataclass(frozen=True)
class NegativeChoice:
    """Choice for each of S sources of a cluster index.

    mode: (S,) uint8, BOTH, IN_BATCH or HARD; min_margin: (S,) float32, how far below its pair a negative must score at
    least (-inf: any).
    """

    mode: np.ndarray
    min_margin: np.ndarray

    @staticmethod
    def of(config: TrainConfig, index: ClusterIndex) -> NegativeChoice | None:
        """Return what the configuration chooses; None if every source has all negatives.

        Raises UsageError if it names a source that the shards do not have.
        """
        wanted = config.negatives
        by_source = wanted if isinstance(wanted, dict) else dict.fromkeys(index.sources, wanted)
        if isinstance(wanted, dict):
            for name in wanted:
                index.require_source(name, f"train.negatives.{name}")
        mode = np.array([_MODES[by_source.get(name, "both")] for name in index.sources], np.uint8)
        margins = [config.filter.of(name).min_margin for name in index.sources]
        min_margin = np.array([-np.inf if margin is None else margin for margin in margins], np.float32)
        return NegativeChoice(mode, min_margin) if mode.any() or np.isfinite(min_margin).any() else None

    @property
    def names_hard(self) -> bool:
        """True if a source trains with hard negatives alone."""
        return bool((self.mode == HARD).any())

    def kept(
        self, source: np.ndarray, counts: np.ndarray, score: np.ndarray | None, negative_scores: np.ndarray | None
    ) -> np.ndarray | None:
        """Return (N,) bool, which of the rows' negatives are used; None if no source uses any.

        source: (n,) numbers of the rows' sources; counts: (n,) negatives of each row; score: (n,) of the rows, NaN for
        none; negative_scores: (N,) likewise.
        """
        if (self.mode == IN_BATCH).all():
            return None
        kept = np.repeat(self.mode[source] != IN_BATCH, counts)
        if score is not None and negative_scores is not None:
            kept &= ~too_near(np.repeat(score, counts), negative_scores, np.repeat(self.min_margin[source], counts))
        return kept


def too_near(score: np.ndarray, negative_score: np.ndarray, min_margin: np.ndarray) -> np.ndarray:
    """Return which negatives score less than a margin below their pair, (N,) bool; none that lacks a score."""
    with np.errstate(invalid="ignore"):
        return score - negative_score < min_margin


def filtered(lists: pa.ListArray, kept: np.ndarray) -> pa.ListArray:
    """Return lists of only those items, of all lists one after the other, that (N,) `kept` says."""
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(kept)])
    offsets = before[np.concatenate([[0], np.cumsum(counts)])].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten().filter(pa.array(kept)))
