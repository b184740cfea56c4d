"""One of three verdicts on an arm, against the user's own threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clusterbatch.config.compare import DecideConfig
from clusterbatch.experiments.statistics import Spread

Outcome = Literal["pays", "does not pay", "cannot tell yet"]
Reason = Literal["gain", "no gain", "too dear", "wide interval", "one seed", "one query"]


@dataclass(frozen=True)
class Verdict:
    """`low`, `high`: interval of the gain that holds for all arms together. `extra_cost`: share of the baseline's.

    `detectable`: smallest true gain that this experiment would have confirmed in 80 of 100 cases. None, as is the
    interval, where the spread is not known. `seeds_needed`, `queries_needed`: what of one alone would settle an open
    case; `both_needed`: what of both together would. None where that would not, or nothing is open.
    """

    outcome: Outcome
    reason: Reason
    gain: float
    low: float | None
    high: float | None
    extra_cost: float
    detectable: float | None
    seeds_needed: int | None = None
    queries_needed: int | None = None
    both_needed: tuple[int, int] | None = None


def decide(gain: Spread, extra_cost: float, arms: int, rule: DecideConfig) -> Verdict:
    """`gain` over the baseline; `arms`: how many are compared with it.

    It pays when the whole interval lies at or above the smallest gain that is worth the trouble, and the price is
    right; it does not when the whole interval lies below. In between this experiment cannot tell.
    """
    confidence = 1 - (1 - rule.confidence) / arms
    if gain.seeds < 2:
        return Verdict("cannot tell yet", "one seed", gain.mean, None, None, extra_cost, None, seeds_needed=3)
    if not gain.is_known:
        return Verdict("cannot tell yet", "one query", gain.mean, None, None, extra_cost, None)
    low, high = gain.interval(confidence)
    detectable = gain.detectable(confidence)
    # A gain of nothing is not a gain, even where the user asks for none.
    if low >= rule.min_gain and low > 0:
        if rule.max_cost is not None and extra_cost > rule.max_cost:
            return Verdict("does not pay", "too dear", gain.mean, low, high, extra_cost, detectable)
        return Verdict("pays", "gain", gain.mean, low, high, extra_cost, detectable)
    if high < rule.min_gain or high <= 0:
        return Verdict("does not pay", "no gain", gain.mean, low, high, extra_cost, detectable)
    margin = abs(gain.mean - rule.min_gain)
    return Verdict(
        "cannot tell yet",
        "wide interval",
        gain.mean,
        low,
        high,
        extra_cost,
        detectable,
        gain.seeds_needed(margin, confidence),
        gain.queries_needed(margin, confidence),
        gain.both_needed(margin, confidence),
    )
