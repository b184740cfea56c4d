"""Cosine below which the rows of a partition are outliers, from those of its cells.

Cells differ: a low cosine of one, of near copies, is a high one of another. So no mean of their thresholds says what a
share of the partition is; each cell keeps the cosines of its own low rows, and together they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from clusterbatch.clustering.partial_sums import COSINE_EDGES, PartialSums
from clusterbatch.store.details import FitPart

# A fit without `cluster.drop_outliers`: no cosine is below this.
NO_OUTLIERS = -2.0
# Position of the multiple 1 among `_multiples`.
_ONE = 4


def outlier_details(sums: PartialSums, share: float | None) -> FitPart:
    """Return what a cell's part says of its low cosines. share: of the partition's rows that are outliers, None: none.

    sums: those of the cell's rows, if it has any, by the centroids that are stored.
    """
    details = FitPart(outlier_below=NO_OUTLIERS)  # type: ignore[typeddict-item]
    if share is not None and sums.rows.any():
        multiples = _multiples(_ONE + 1 + math.ceil(2 * math.log2(1 / share)))
        low = sums.quantiles(np.minimum(1, share * multiples)).tolist()
        details["outlier_below"], details["low_cosines"] = low[_ONE], low
    return details


def outlier_below(cells: Sequence[FitPart], rows: Sequence[float]) -> float:
    """Return the cosine that about a share of a partition's rows lies below. rows: of each of its cells, about."""
    if len(cells) == 1:
        return cells[0]["outlier_below"]
    filled = [(cell, weight) for cell, weight in zip(cells, rows, strict=True) if weight]
    if any("low_cosines" not in cell for cell, _ in filled):
        # Without outliers, or made by a version that took the mean of the cells.
        return float(np.average([cell["outlier_below"] for cell in cells], weights=rows))
    # Rows below each edge, in shares of outliers.
    below = np.zeros(len(COSINE_EDGES))
    for cell, weight in filled:
        low = cell["low_cosines"]
        below += weight * np.interp(COSINE_EDGES, low, _multiples(len(low)))
    return float(COSINE_EDGES[np.flatnonzero(below <= sum(rows))[-1]])


def _multiples(count: int) -> np.ndarray:
    """Return the (count,) multiples of the share at which a cell's low cosines are kept."""
    return np.concatenate([[0, 0.25, 0.5, 0.75], 2 ** (np.arange(count - _ONE) / 2)])
