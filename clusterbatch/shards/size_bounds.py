"""Clusters of bounded size: small ones are merged with a neighbour, large ones split into equal fragments.

This works on all rows, after the shuffle, so that `max_size` holds exactly and not only for the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

_POWER_ITERATIONS = 12


def merge_small(rows: np.ndarray, means: np.ndarray, partition: np.ndarray, min_size: int) -> np.ndarray:
    """Merge clusters with fewer than `min_size` rows; return (K,) int64, ascending: the number of the merged cluster.

    All arguments are in packing order. rows: (K,) of each cluster; means: (K, D) unit; partition: (K,), clusters of
    different ones are never merged. The smallest cluster is the first to join its more similar neighbour in the order;
    a partition smaller than `min_size` stays one cluster.
    """
    clusters = len(rows)
    sizes = rows.astype(np.int64).tolist()
    sums = [means[number] * rows[number] for number in range(clusters)]
    # A cluster that has been joined keeps the number of the first of its members; -1: no neighbour on that side.
    starts = np.flatnonzero(np.diff(partition, prepend=partition[:1] - 1, append=partition[-1:] - 1)).tolist()
    left, right = list(range(-1, clusters - 1)), [*range(1, clusters), -1]
    for first, after in pairwise(starts):
        left[first] = right[after - 1] = -1
    joined = list(range(clusters))
    waiting = [(size, number) for number, size in enumerate(sizes) if size < min_size]
    heapify(waiting)
    while waiting:
        size, chosen = heappop(waiting)
        if joined[chosen] != chosen or sizes[chosen] != size:
            continue
        cosines = {place: _cosine(sums[chosen], sums[place]) for place in (left[chosen], right[chosen]) if place >= 0}
        if not cosines:
            continue
        into, gone = sorted((chosen, max(cosines, key=lambda place: cosines[place])))
        joined[gone] = into
        sizes[into] += sizes[gone]
        sums[into] = sums[into] + sums[gone]
        right[into] = right[gone]
        if right[into] >= 0:
            left[right[into]] = into
        if sizes[into] < min_size:
            heappush(waiting, (sizes[into], into))
    # What joins a cluster follows its members, so heads and members are in the same order.
    return np.cumsum(np.array(joined) == np.arange(clusters)) - 1


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


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-12))
