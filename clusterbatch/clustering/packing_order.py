"""Order of the clusters of a source, in which neighbours share what remains of their batches."""

from __future__ import annotations

import numpy as np

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import LocalRows

# Above this many clusters the (K, K) similarities would take more than 64 MiB, and the path more than a second.
_GREEDY_LIMIT = 4096


def packing_order(centroids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A path through (K, D) unit centroids that mostly steps to near neighbours; returns (K,) int64, a permutation.

    Greedy travelling salesman: start at the centroid farthest from the mean (an end of the cloud), continue with the
    nearest not yet visited. For large K a path through sqrt(K) coarse clusters of centroids, and paths inside each.
    """
    if len(centroids) <= _GREEDY_LIMIT:
        return _greedy(centroids)
    labels, coarse = merge_upward(centroids, weights, round(len(centroids) ** 0.5))
    order: list[np.ndarray] = []
    for cluster in _greedy(coarse).tolist():
        members = np.flatnonzero(labels == cluster)
        if not len(members):
            continue
        inside = members[_greedy(centroids[members])]
        if order:
            first, last = centroids[inside[[0, -1]]] @ centroids[order[-1][-1]]
            inside = inside if first >= last else inside[::-1]
        order.append(inside)
    return np.concatenate(order)


def merge_upward(
    centroids: np.ndarray, weights: np.ndarray, clusters: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A coarser level of a finished fit, without its rows: its centroids, (K, D), clustered with their rows as weights.

    Returns (K,) int64, the coarse cluster of each centroid, and the (clusters, D) coarse centroids.
    """
    shuffled = np.random.default_rng(seed).permutation(len(centroids))
    rows = LocalRows.of(centroids[shuffled], weights[shuffled], clusters)
    coarse = fit(rows, FitSettings(clusters, passes=12, seed=seed, tolerance=1e-5)).centers.centroids
    return Assigner(coarse)(centroids).labels.numpy(), coarse


def _greedy(centroids: np.ndarray) -> np.ndarray:
    if len(centroids) <= 2:
        return np.arange(len(centroids))
    similarity = centroids @ centroids.T
    current = int(np.argmin(centroids @ centroids.mean(axis=0)))
    order = np.empty(len(centroids), np.int64)
    for position in range(len(centroids)):
        order[position] = current
        similarity[:, current] = -np.inf
        current = int(np.argmax(similarity[current]))
    return order
