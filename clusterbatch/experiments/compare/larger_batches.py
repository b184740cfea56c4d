"""Larger random batches instead of an arm: the size at which they catch up, and their quality at the same compute.

Both are read off the random arms of a comparison, on straight lines over the logarithm of the size (of the compute).
Only what was measured is interpolated, never beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clusterbatch.experiments.compare.results import ArmResult, Comparison

# What a plain random arm may change beside its size.
_PLAIN = {"batches.stratify", "batches.size"}


@dataclass(frozen=True)
class CatchUp:
    """Random batches beside one arm.

    size: pairs a batch at which they reach its quality, None if none that was tried does; smallest, largest: sizes that
    were tried; same_compute: their quality for the arm's own worker hours, None outside of the sizes that were tried.
    """

    arm: str
    size: float | None
    smallest: int
    largest: int
    same_compute: float | None


def catch_up(comparison: Comparison, arm: ArmResult) -> CatchUp | None:
    """Return None if fewer than two sizes of random batches were compared, or the arm itself is random."""
    random = sorted((each for each in comparison.arms if _is_random(each)), key=lambda each: each.batch)
    if len({each.batch for each in random}) < 2 or _is_random(arm):
        return None
    sizes, quality = [each.batch for each in random], [each.spread.mean for each in random]
    # A busy machine may take longer for smaller batches.
    hours, of_hours = zip(*sorted((each.cost.hours, each.spread.mean) for each in random), strict=True)
    compute = None
    if hours[0] <= arm.cost.hours <= hours[-1]:
        compute = float(np.interp(np.log(arm.cost.hours), np.log(hours), of_hours))
    return CatchUp(arm.name, _first_at(sizes, quality, arm.spread.mean), sizes[0], sizes[-1], compute)


def _is_random(arm: ArmResult) -> bool:
    return arm.changes.get("batches.stratify") == "random" and set(arm.changes) <= _PLAIN


def _first_at(sizes: Sequence[int], quality: Sequence[float], wanted: float) -> float | None:
    """Return the smallest size, between those that were tried, at which `wanted` is reached."""
    if quality[0] >= wanted:
        return float(sizes[0])
    for position in range(1, len(sizes)):
        below, above = quality[position - 1], quality[position]
        if above >= wanted:
            share = (wanted - below) / (above - below)
            return float(sizes[position - 1] * (sizes[position] / sizes[position - 1]) ** share)
    return None
