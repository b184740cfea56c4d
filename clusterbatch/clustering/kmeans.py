"""Spherical mini-batch k-means. No Ray: whoever holds the rows answers with mergeable sums.

The rows of a fit are a sample in random order, cut into fixed chunks. First rounds look at an eighth of the chunks
each, going round and round; later ones at a quarter, the last at all. Older rounds' sums are kept with a weight that
halves from round to round, which is a learning rate of (weight of the new rows) / (weight of all rows) for each
centroid. Two passes in eighths, one in quarters and one whole bring centroids about as far as 25 whole ones would.

Sums are merged in chunk order, so the result is the same, bit for bit, however many workers share the chunks.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.balance import balanced
from clusterbatch.clustering.seeding import seed_centroids
from clusterbatch.clustering.sums import COSINE_BINS, Centers, PartialSums, Rows

# Share of the earlier rounds' weight that a round keeps, while rounds see different rows.
_MEMORY = 0.5
# A centroid with less than this share of the mean cluster's weight is moved into the heaviest cluster.
_TINY = 0.05
# A mini-batch has at least this many rows per centroid.
_LEAST_ROWS = 8


@dataclass(frozen=True)
class FitSettings:
    """What decides a fit, together with the rows.

    passes: how often each row is looked at, at most. tolerance: rounds over all rows end when the mean cosine gains
    less than this share. balanced: similarities are biased until clusters are of about one size.
    """

    clusters: int
    passes: int = 4
    seed: int = 0
    restarts: int = 1
    dtype: torch.dtype = torch.float32
    tolerance: float = 5e-4
    balanced: bool = False


@dataclass
class Fit:
    """The centres, and the sums of all rows that led to the last update.

    history: mean cosine of each round's rows before its update; the centres are a little better than its last entry.
    """

    centers: Centers
    sums: PartialSums
    history: list[float] = field(default_factory=list)

    @property
    def mean_cosine(self) -> float:
        return self.sums.mean_cosine


def fit(rows: Rows, settings: FitSettings, initial: np.ndarray | None = None) -> Fit:
    """The best of `settings.restarts` fits of `rows`; at most as many clusters as there are rows.

    initial: (K, D) centroids to begin at, which keep their numbers; rows of zeros are drawn from the sample. Then there
    is one fit, and no rounds over parts of the rows: it begins near its end.
    """
    if initial is not None:
        return _fit_from(rows, settings, initial)
    fits = (_fit_once(rows, settings, settings.seed + restart) for restart in range(settings.restarts))
    return max(fits, key=lambda found: found.mean_cosine)


def counted(rows: Rows, centers: Centers, dtype: torch.dtype) -> Fit:
    """Centres that stay as they are, with the sums of the rows that are nearest to each."""
    chunks = list(range(len(rows.chunk_rows)))
    if not chunks:
        clusters, dimensions = centers.centroids.shape
        nothing = PartialSums(
            np.zeros(clusters, np.int64),
            np.zeros(clusters),
            np.zeros((clusters, dimensions)),
            0.0,
            np.zeros(COSINE_BINS, np.int64),
        )
        return Fit(centers, nothing)
    return Fit(centers, rows.partial_sums(centers, chunks, dtype))


def _fit_once(rows: Rows, settings: FitSettings, seed: int) -> Fit:
    total, chunks = sum(rows.chunk_rows), len(rows.chunk_rows)
    clusters = min(settings.clusters, total)
    random = np.random.default_rng(seed)
    centroids = seed_centroids(*rows.head(min(total, max(16 * clusters, 4096))), clusters, random)
    rounds = list(_rounds(chunks, settings.passes, total // (_LEAST_ROWS * clusters)))
    return _iterate(rows, settings, centroids, rounds, random)


def _fit_from(rows: Rows, settings: FitSettings, initial: np.ndarray) -> Fit:
    random = np.random.default_rng(settings.seed)
    centroids = np.array(initial, np.float32)
    missing = np.flatnonzero(np.linalg.norm(centroids, axis=1) < 1e-9)
    if len(missing):
        head, weights = rows.head(min(sum(rows.chunk_rows), max(16 * len(missing), 4096)))
        known = np.delete(centroids, missing, axis=0)
        if len(known):
            # Where those that are known are far: else they would share rows that have a centroid already.
            distance = np.maximum(1 - Assigner(known)(head).cosine.numpy(), 1e-6)
            weights = distance if weights is None else distance * weights
        drawn = seed_centroids(head, weights, min(len(missing), len(head)), random)
        centroids[missing] = np.resize(drawn, (len(missing), drawn.shape[1]))
    rounds = [list(range(len(rows.chunk_rows)))] * settings.passes
    return _iterate(rows, settings, centroids, rounds, random)


def _iterate(
    rows: Rows, settings: FitSettings, centroids: np.ndarray, rounds: Sequence[list[int]], random: np.random.Generator
) -> Fit:
    chunks = len(rows.chunk_rows)
    kept: PartialSums | None = None
    history: list[float] = []
    for number, chosen in enumerate(rounds):
        found = rows.partial_sums(Centers(centroids), chosen, settings.dtype)
        history.append(found.mean_cosine)
        kept = found if kept is None or len(chosen) == chunks else _decayed(kept, found)
        settled = number > 0 and len(chosen) == len(rounds[number - 1]) == chunks
        last = number == len(rounds) - 1 or (settled and history[-1] - history[-2] < settings.tolerance * history[-1])
        # One that is moved in the last round would not find its place any more.
        centroids = _update(centroids, kept, random, reseed=not last)
        if last:
            break
    if settings.balanced:
        return Fit(*balanced(rows, centroids, settings.dtype), history)
    return Fit(Centers(centroids), found, history)


def _rounds(chunks: int, passes: int, most_parts: int) -> Iterator[list[int]]:
    """The chunks of each round: about a third of the passes in eighths, a third in quarters, the last third whole."""
    whole = max(1, passes // 3)
    quarters = (passes - whole) // 2
    position = 0
    for parts, times in ((8, passes - whole - quarters), (4, quarters), (1, whole)):
        parts = max(1, min(parts, most_parts, chunks))
        size = -(-chunks // parts)
        for _ in range(times * parts):
            yield sorted((position + step) % chunks for step in range(size))
            position = (position + size) % chunks


def _decayed(kept: PartialSums, found: PartialSums) -> PartialSums:
    counts, sums = found.counts + _MEMORY * kept.counts, found.sums + _MEMORY * kept.sums
    return PartialSums(found.rows, counts, sums, found.cosine, found.histogram)


def _update(centroids: np.ndarray, kept: PartialSums, random: np.random.Generator, reseed: bool) -> np.ndarray:
    """Unit means of the rows; centroids that (almost) nobody chose move beside those that most chose."""
    lengths = np.linalg.norm(kept.sums, axis=1, keepdims=True)
    moved = np.where(lengths > 1e-9, kept.sums / np.maximum(lengths, 1e-9), centroids)
    if reseed:
        tiny = np.flatnonzero(kept.counts < _TINY * kept.counts.mean())
        heaviest = np.argsort(-kept.counts, kind="stable")[: len(tiny)]
        noise = random.standard_normal((len(tiny), moved.shape[1]))
        moved[tiny] = moved[heaviest] + 0.05 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        moved[tiny] /= np.linalg.norm(moved[tiny], axis=1, keepdims=True)
        # Their next rows alone shall decide where they go.
        kept.counts[tiny] = 0
        kept.sums[tiny] = 0
    return np.ascontiguousarray(moved, dtype=np.float32)
