"""Spherical mini-batch k-means. No Ray: the holder of the rows answers with mergeable sums.

The rows of a fit are a sample in random order, cut into fixed chunks. First rounds look at an eighth of the chunks
each, going round and round; later ones at a quarter, the last at all. Older rounds' sums are kept with a weight that
halves from round to round, which is a learning rate of (weight of the new rows) / (weight of all rows) for each
centroid. Two passes in eighths, one in quarters and one whole bring centroids about as far as 25 whole ones would.

Sums are merged in chunk order, so the result is the same, bit for bit, however many workers share the chunks.

Legend: N rows, K centroids, D dimensions.

Clusters of about one size: each centroid's similarity is biased until about as many rows prefer it as any other.

First centroids: k-means++ in rounds, so that seeding costs a few GEMMs and not K passes.

Bahmani et al. 2012, "Scalable K-Means++" (arXiv 1203.6402): many candidates are drawn at once by their distance to
those drawn before. Here each round draws its share of the K centroids; there is nothing to recluster afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.partial_sums import COSINE_BINS, Centers, PartialSums, Rows

_BALANCE_ROUNDS = 30
# How far one round moves the bias of a cluster that is e times too large, in cosine; less from round to round.
_FIRST_STEP, _SHRINK = 0.03, 0.92


def balanced(rows: Rows, centroids: np.ndarray, dtype: torch.dtype) -> tuple[Centers, PartialSums]:
    """Biases, (k,) float32 in cosine, for given centroids (k, D), and all rows' sums under them.

    The same biases serve rows that were not in the sample, in one pass and in any order; so sizes come out about equal,
    not exactly. Rows are given away where that costs least, at the borders.
    """
    everything = range(len(rows.chunk_rows))
    bias = np.zeros(len(centroids), np.float32)
    step = _FIRST_STEP
    for _ in range(_BALANCE_ROUNDS):
        counts = rows.partial_sums(Centers(centroids, bias), everything, dtype).counts
        excess = np.log((counts + 0.5) / (counts.mean() + 0.5))
        bias = (bias - step * np.clip(excess, -2, 2)).astype(np.float32)
        step *= _SHRINK
    centers = Centers(centroids, bias)
    return centers, rows.partial_sums(centers, everything, dtype)


_SEEDING_ROUNDS = 8


def seed_centroids(
    vectors: np.ndarray, weights: np.ndarray | None, clusters: int, random: np.random.Generator
) -> np.ndarray:
    """`clusters` different rows of (N, D) unit vectors, drawn by weight times distance to those drawn before.

    Distance is 1 - cosine, half the squared Euclidean distance of unit vectors. Returns (clusters, D) float32.
    """
    assert clusters <= len(vectors)
    weights = np.ones(len(vectors)) if weights is None else np.maximum(weights, 0)
    chosen = np.empty(0, np.int64)
    distance = np.ones(len(vectors))
    for size in _round_sizes(clusters):
        mass = weights * distance
        mass[chosen] = 0
        chosen = np.concatenate([chosen, _draw(mass, chosen, size, random)])
        if len(chosen) < clusters:
            nearest = Assigner(vectors[chosen[-size:]])(vectors).cosine.numpy()
            distance = np.minimum(distance, np.maximum(1 - nearest, 0))
    return np.ascontiguousarray(vectors[chosen], dtype=np.float32)


def _round_sizes(clusters: int) -> list[int]:
    """Small first rounds, in which distances still say little, then doubling."""
    edges = np.unique(np.ceil(clusters / 2.0 ** np.arange(_SEEDING_ROUNDS - 1, -1, -1)).astype(int))
    return np.diff(edges, prepend=0).tolist()


def _draw(mass: np.ndarray, chosen: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """`size` different rows by `mass`; when fewer rows have any (duplicates), the rest are any that are left."""
    possible = int(np.count_nonzero(mass))
    drawn = (
        random.choice(len(mass), min(size, possible), replace=False, p=mass / mass.sum()) if possible else chosen[:0]
    )
    if len(drawn) < size:
        left = np.setdiff1d(np.arange(len(mass)), np.concatenate([chosen, drawn]))
        drawn = np.concatenate([drawn, left[: size - len(drawn)]])
    return drawn


# Share of the earlier rounds' weight that a round keeps, while rounds see different rows.
_MEMORY = 0.5
# A centroid with less than this share of the mean cluster's weight is moved into the heaviest cluster.
_TINY = 0.05
# A mini-batch has at least this many rows per centroid.
_LEAST_ROWS = 8


@dataclass(frozen=True)
class FitSettings:
    """Settings that decide a fit, together with the rows.

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


def fixed(rows: Rows, centers: Centers, dtype: torch.dtype) -> Fit:
    """Return statistics of fixed centres, without an update: the sums of the rows nearest to each."""
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
            # Far from the known ones: otherwise they would share rows that have a centroid already.
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
        # Only their next rows decide where they go.
        kept.counts[tiny] = 0
        kept.sums[tiny] = 0
    return np.ascontiguousarray(moved, dtype=np.float32)
