"""Quality and cost of refresh intervals on a corpus that grew month by month, and the recommended one. No Ray.

Legend: S seeds, M months after the first model, Q queries. A query asks for what arrives in one month (0: there from
the start, -1: in none). It is new in that month and old in all later ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from clusterbatch.experiments.compare.statistics import difference, joint_level, mean_spread


def months_of(scores: np.ndarray, arrival: np.ndarray) -> list[tuple[float, float]]:
    """Return (old, new) means of month 1 to M; scores: (S, M, Q), arrival: (Q,) months."""
    found = []
    for position in range(scores.shape[1]):
        values = scores[:, position].mean(axis=0)
        old = (arrival >= 0) & (arrival <= position)
        found.append((float(values[old].mean()), float(values[arrival == position + 1].mean())))
    return found


def on_old(scores: np.ndarray, arrival: np.ndarray) -> np.ndarray:
    """Return (S, Q') each old query's mean over the months in which it is old."""
    months = scores.shape[1]
    columns = [
        scores[:, arrival[query] :, query].mean(axis=1)
        for query in np.flatnonzero((arrival >= 0) & (arrival < months)).tolist()
    ]
    return np.stack(columns, axis=1)


def on_new(scores: np.ndarray, arrival: np.ndarray) -> np.ndarray:
    """Return (S, Q') each new query's score in the month its answers arrive."""
    queries = np.flatnonzero(arrival >= 1)
    return scores[:, arrival[queries] - 1, queries]


def summarise(
    scores: Mapping[str, np.ndarray], arrival: np.ndarray, costs: Mapping[str, float], confidence: float
) -> dict[str, dict[str, Any]]:
    """Return {old, new, value (their mean), cost (a month), gain, low, high} by policy.

    gain: of the value over the first policy's, with an interval at a level that holds for all policies together; None
    for that policy itself and, the interval, with one seed.
    """
    level = joint_level(confidence, len(scores) - 1)
    sides = {name: [on_old(each, arrival), on_new(each, arrival)] for name, each in scores.items()}
    baseline = next(iter(sides.values()))
    found: dict[str, dict[str, Any]] = {}
    for name, (old, new) in sides.items():
        gain = difference([old, new], baseline) if found else None
        low, high = gain.interval(level) if gain else (math.nan, math.nan)
        found[name] = {
            "old": float(old.mean()),
            "new": float(new.mean()),
            "value": mean_spread([old, new]).mean,
            "cost": costs[name],
            "gain": gain.mean if gain else None,
            "low": None if math.isnan(low) else low,
            "high": None if math.isnan(high) else high,
        }
    return found


def recommend(policies: Mapping[str, Mapping[str, Any]], margin: float) -> tuple[str, str]:
    """Return (the cheapest policy that is at most `margin` below the best, why); policies: as of summarise."""
    best = max(policies, key=lambda name: policies[name]["value"])
    good = [name for name in policies if policies[name]["value"] >= policies[best]["value"] - margin]
    chosen = min(good, key=lambda name: policies[name]["cost"])
    own = policies[chosen]
    why = f"{own['value']:.4f} on old and new data at {own['cost']:.4g} a month"
    if chosen != best:
        other = policies[best]
        why += f"; {best} is better by no more than {margin:g} ({other['value']:.4f}) and costs {other['cost']:.4g}"
    cheaper = [name for name in policies if policies[name]["cost"] < own["cost"]]
    if cheaper:
        why += "; cheaper ones lose more: " + ", ".join(f"{name} {policies[name]['value']:.4f}" for name in cheaper)
    return chosen, why
