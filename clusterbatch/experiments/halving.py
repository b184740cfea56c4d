"""Successive halving (Jamieson and Talwalkar 2016): many candidates a little, the best longer. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rung_sizes(candidates: int, rungs: int, reduction: int) -> list[int]:
    """How many candidates each rung trains: all, then 1 / reduction of those before, rounded up, at least one."""
    sizes = [candidates]
    while len(sizes) < rungs and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // reduction))
    return sizes


def rung_steps(steps: int, rungs: int, reduction: int) -> list[int]:
    """Steps of each rung; the last one trains all of them."""
    return [max(1, round(steps / reduction ** (rungs - 1 - rung))) for rung in range(rungs)]


def best(values: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` largest values, best first; of equal ones the earlier is better."""
    return np.argsort(-np.asarray(values), kind="stable")[:count].tolist()
