"""First centroids: k-means++ in rounds, so that seeding costs a few GEMMs and not K passes.

Bahmani et al. 2012, "Scalable K-Means++" (arXiv 1203.6402): many candidates are drawn at once by their distance to
those drawn before. Here each round draws its share of the K centroids; there is nothing to recluster afterwards.
"""

from __future__ import annotations

import numpy as np

from clusterbatch.clustering.assign import Assigner

_ROUNDS = 8


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
    edges = np.unique(np.ceil(clusters / 2.0 ** np.arange(_ROUNDS - 1, -1, -1)).astype(int))
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
