"""Clusters of bounded size: small ones are merged with a neighbour, large ones split into equal fragments.

This works on all rows, after the shuffle, so that `max_size` holds exactly and not only for the sample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_POWER_ITERATIONS = 12


def merge_small(rows: np.ndarray, means: np.ndarray, partition: np.ndarray, min_size: int) -> np.ndarray:
    """Merge clusters with fewer than `min_size` rows; return (K,) int64, ascending: the number of the merged cluster.

    All arguments are in packing order. rows: (K,) of each cluster; means: (K, D) unit; partition: (K,), clusters of
    different ones are never merged. The smallest cluster is the first to join its more similar neighbour in the order;
    a partition smaller than `min_size` stays one cluster.
    """
    parts = [[number] for number in range(len(rows))]
    sizes = rows.astype(np.int64).tolist()
    sums = [means[number] * rows[number] for number in range(len(rows))]
    partitions = partition.tolist()
    while True:
        small = [place for place, size in enumerate(sizes) if size < min_size and _neighbours(partitions, place)]
        if not small:
            break
        chosen = min(small, key=lambda place: (sizes[place], place))
        cosines = {place: _cosine(sums[chosen], sums[place]) for place in _neighbours(partitions, chosen)}
        left, right = sorted((chosen, max(cosines, key=lambda place: cosines[place])))
        parts[left] += parts.pop(right)
        sizes[left] += sizes.pop(right)
        sums[left] = sums[left] + sums.pop(right)
        partitions.pop(right)
    merged = np.empty(len(rows), np.int64)
    for number, members in enumerate(parts):
        merged[members] = number
    return merged


def split_large(rows: int, max_size: int, vectors: Callable[[], np.ndarray]) -> np.ndarray:
    """Return (rows,) int64 fragments of equal size, within one row, and of at most `max_size` rows.

    vectors: returns (rows, D) features, called if a split is needed. Rows are halved again and again across the
    direction in which they differ most, so that neighbouring fragments are similar.
    """
    part = np.zeros(rows, np.int64)
    parts = -(-rows // max_size)
    if parts > 1:
        _halve(vectors().astype(np.float32), np.arange(rows), parts, 0, part)
    return part


def _halve(vectors: np.ndarray, members: np.ndarray, parts: int, first: int, part: np.ndarray) -> None:
    if parts == 1:
        part[members] = first
        return
    centred = vectors[members] - vectors[members].mean(axis=0)
    axis = centred[np.argmax(np.einsum("nd,nd->n", centred, centred))]
    for _ in range(_POWER_ITERATIONS):
        moved = centred.T @ (centred @ axis)
        length = np.linalg.norm(moved)
        if length < 1e-12:
            break
        axis = moved / length
    order = members[np.argsort(centred @ axis, kind="stable")]
    left = parts // 2
    # Rounded up, so that no fragment gets more than an equal share of the rows, rounded up.
    cut = -(-len(members) * left // parts)
    _halve(vectors, np.sort(order[:cut]), left, first, part)
    _halve(vectors, np.sort(order[cut:]), parts - left, first + left, part)


def _neighbours(partitions: list[int], place: int) -> list[int]:
    inside = (other for other in (place - 1, place + 1) if 0 <= other < len(partitions))
    return [other for other in inside if partitions[other] == partitions[place]]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-12))
