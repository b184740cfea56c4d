"""Micro-batches by token budget: rows of like length go through the backbone together."""

from __future__ import annotations

import numpy as np


def micro_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows in micro-batches of at most `budget` tokens, padding included, longest rows first.

    `lengths` (N,) -> row numbers, each (n,) int64, every row exactly once; a row over the budget stands alone. A
    function of the lengths alone; ties keep input order. Longest first: what does not fit in memory fails at once, and
    allocators grow only once.
    """
    lengths = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        # The first row is the longest, so it decides how many fit.
        rows = max(1, budget // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches
