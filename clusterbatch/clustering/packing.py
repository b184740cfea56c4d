"""The order in which clusters of one source stand beside each other: neighbours share what remains of their batches."""

from __future__ import annotations

import numpy as np


def packing_order(centroids: np.ndarray) -> np.ndarray:
    """A path through (K, D) unit centroids that mostly steps to near neighbours; returns (K,) int64, a permutation.

    Greedy travelling salesman: start at the centroid farthest from the mean (an end of the cloud), go on to the nearest
    not yet visited. O(K^2 D) for K in the thousands; above `_GREEDY_LIMIT` the centroids are halved along their main
    direction first, so that each path stays inside one half.
    """
    count = len(centroids)
    if count <= 2:
        return np.arange(count)
    if count > _GREEDY_LIMIT:
        return _halved(centroids)
    return _greedy(centroids, int(np.argmin(centroids @ centroids.mean(axis=0))))


_GREEDY_LIMIT = 4096


def _greedy(centroids: np.ndarray, start: int) -> np.ndarray:
    similarity = centroids @ centroids.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.empty(len(centroids), np.int64)
    current = start
    for position in range(len(centroids)):
        order[position] = current
        similarity[:, current] = -np.inf
        current = int(np.argmax(similarity[current]))
    return order


def _halved(centroids: np.ndarray) -> np.ndarray:
    """Orders each half by itself, the second reversed where that brings the ends together."""
    direction = centroids - centroids.mean(axis=0)
    axis = direction[np.argmax(np.einsum("kd,kd->k", direction, direction))]
    for _ in range(8):
        axis = direction.T @ (direction @ axis)
        axis /= np.linalg.norm(axis)
    ranked = np.argsort(direction @ axis, kind="stable")
    halves = [ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]]
    left, right = (half[packing_order(centroids[half])] for half in halves)
    ends = [
        (float(centroids[a[-1]] @ centroids[b[0]]), turned)
        for turned, (a, b) in enumerate(
            [(left, right), (left, right[::-1]), (left[::-1], right), (left[::-1], right[::-1])]
        )
    ]
    turned = max(ends, key=lambda pair: (pair[0], -pair[1]))[1]
    return np.concatenate([left[::-1] if turned & 2 else left, right[::-1] if turned & 1 else right])
