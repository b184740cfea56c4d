"""Rows of the comparison's table, as figures; how they are written is the template's matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from clusterbatch.experiments.comparison import ArmResult, Comparison
from clusterbatch.experiments.wording import Language, verdict_word


def arm_rows(comparison: Comparison, language: Language) -> list[dict[str, Any]]:
    """One row per arm; None where a figure does not exist (the baseline's own difference, an interval of one seed or of
    a collection of one query)."""
    return [_row(comparison, arm, language) for arm in comparison.arms]


def steps_to_reach(comparison: Comparison, arm: ArmResult, value: float) -> float | None:
    """Steps after which an arm's mean curve first reaches `value`, on straight lines between its points."""
    curve = arm.curve.mean(1)
    for end in range(1, len(curve)):
        if curve[end] >= value:
            low, high = curve[end - 1], curve[end]
            share = 1.0 if high == low else float(np.clip((value - low) / (high - low), 0, 1))
            return float(comparison.steps[end - 1] + share * (comparison.steps[end] - comparison.steps[end - 1]))
    return None


def _row(comparison: Comparison, arm: ArmResult, language: Language) -> dict[str, Any]:
    several = arm.spread.seeds > 1
    seeds = np.mean(
        [comparison.scores[arm.name][name, comparison.metric].mean(1) for name in comparison.collections], 0
    )
    gain = arm.gain
    low, high = gain.interval(comparison.simultaneous) if gain and gain.is_known else (None, None)
    reach = steps_to_reach(comparison, arm, float(comparison.baseline.curve[-1].mean()))
    ahead = arm.curve.mean(1) - comparison.baseline.curve.mean(1)
    return {
        "arm": arm.name,
        "verdict": verdict_word(arm, language),
        "outcome": arm.verdict.outcome if arm.verdict else None,
        "value": arm.spread.mean,
        "spread": float(seeds.std(ddof=1)) if several else None,
        "difference": gain.mean if gain else None,
        "low": low,
        "high": high,
        "p_randomisation": arm.p_randomisation,
        "p_corrected": arm.p_corrected if arm.spread.is_known else None,
        # The first point of the curves, and the last two: whether an advantage grows or melts.
        "early": float(ahead[1]) if gain else None,
        "late": float(ahead[-2:].mean()) if gain else None,
        "trend": float(ahead[-2:].mean() - ahead[1]) if gain else None,
        "reach": reach,
        "reach_pairs": None if reach is None else round(reach * arm.batch),
        "reach_price": None if reach is None else _price_of_steps(arm, reach / float(comparison.steps[-1])),
        "per_point": _price_per_point(comparison, arm),
        "batch": arm.batch,
        "pairs": arm.pairs,
        "purity": arm.purity,
        "hardness": arm.hardness,
        "minutes": arm.cost.seconds / 60,
        "hours": arm.cost.hours,
        "device": arm.cost.device,
        "price": arm.cost.price,
        "traffic": arm.cost.traffic.model_dump(),
        "learning_rate": arm.setting["learning_rate"],
        "temperature": arm.setting["temperature"],
        "changes": dict(arm.changes),
    }


def _price_of_steps(arm: ArmResult, share: float) -> float:
    """Of the shared stages and a share of the training."""
    return arm.cost.price - (1 - share) * arm.cost.training_price


def _price_per_point(comparison: Comparison, arm: ArmResult) -> float | None:
    """What a hundredth of the metric costs beyond the baseline; None where there is no gain to pay for."""
    if arm.gain is None or arm.gain.mean <= 0:
        return None
    return (arm.cost.price - comparison.baseline.cost.price) / (100 * arm.gain.mean)
