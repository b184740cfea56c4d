"""Clusters of about one size: each centroid's similarity is biased until about as many rows prefer it as any other."""

from __future__ import annotations

import numpy as np
import torch

from clusterbatch.clustering.sums import Centers, PartialSums, Rows

_ROUNDS = 30
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
    for _ in range(_ROUNDS):
        counts = rows.partial_sums(Centers(centroids, bias), everything, dtype).counts
        excess = np.log((counts + 0.5) / (counts.mean() + 0.5))
        bias = (bias - step * np.clip(excess, -2, 2)).astype(np.float32)
        step *= _SHRINK
    centers = Centers(centroids, bias)
    return centers, rows.partial_sums(centers, everything, dtype)
