"""Differences between arms with intervals, and one of three verdicts on each, against the user's own threshold.

An arm is measured with S seeds on Q[c] queries of each of C collections. Two things are left to chance: the queries
that somebody happened to judge, and the seeds. With d[s, q] the difference of a query's score under seed s,
the mean difference has variance

    V = V[1] + ... + V[C] + V_seeds,   V[c]    = var over q of c of mean over s d[s, q], divided by Q[c] C^2,
                                       V_seeds = var over s of mean over c and q d[s, q], divided by S,

a sum that errs on the safe side, because the effect of seeds on single queries is in both. Intervals are t intervals
with Satterthwaite's degrees of freedom (Satterthwaite 1946, "An approximate distribution of estimates of variance
components"): every collection is a component of its own, for the variance of five queries is not known any better
because another collection has a thousand. The randomisation test asks only about queries: given these trained models,
would a random relabelling of the two arms, query by query, differ so much? Several arms against one baseline: Holm's
correction of p values, and intervals at the level alpha / arms, so that all hold together.

Collections count alike, whatever their number of queries (BEIR's average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from clusterbatch.config.compare import DecideConfig

_RESAMPLES = 4999
_POWER = 0.8
_MOST_SEEDS = 1000
# Metrics go from 0 to 1: smaller errors are rounding.
_NO_ERROR = 1e-9


@dataclass(frozen=True)
class Spread:
    """Mean of a quantity and its uncertainty.

    of_queries: for each collection the share of its queries in the variance, and their number. The variance of a
    single query, or seed, is NaN.
    """

    mean: float
    of_queries: tuple[tuple[float, int], ...]
    variance_seeds: float
    seeds: int

    @property
    def queries(self) -> int:
        """Return the queries of all collections."""
        return sum(queries for _, queries in self.of_queries)

    @property
    def variance_queries(self) -> float:
        return sum(variance for variance, _ in self.of_queries)

    @property
    def is_known(self) -> bool:
        """Return whether there is an interval: one seed, or one query of a collection, says nothing of any other.

        Nor do scores that do not vary at all: a few hits of a coarse metric, or two arms with the same vectors.
        """
        several = self.seeds > 1 and all(queries > 1 for _, queries in self.of_queries)
        return several and self.error > _NO_ERROR

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom; NaN if the spread is not known."""
        if not self.is_known:
            return math.nan
        total = self.variance_queries + self.variance_seeds
        parts = sum(variance**2 / (queries - 1) for variance, queries in self.of_queries)
        return total**2 / (parts + self.variance_seeds**2 / (self.seeds - 1))

    @property
    def error(self) -> float:
        """Return the standard error of the mean."""
        return math.sqrt(self.variance_queries + self.variance_seeds)

    def interval(self, confidence: float) -> tuple[float, float]:
        half = self.half_width(confidence)
        return self.mean - half, self.mean + half

    def half_width(self, confidence: float) -> float:
        # The function below stats.t.ppf, without its checks: the search for enough seeds calls this hundreds of times.
        return float(special.stdtrit(self.freedom, (1 + confidence) / 2)) * self.error

    def p_value(self) -> float:
        """Return the two-sided p value of a mean of zero; NaN if the spread is not known."""
        if not self.is_known:
            return math.nan
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def detectable(self, confidence: float) -> float:
        """Return the smallest true difference that an experiment like this one confirms in 80 of 100 cases."""
        quantiles = stats.t.ppf([(1 + confidence) / 2, _POWER], self.freedom)
        return float(quantiles.sum()) * self.error

    def seeds_needed(self, margin: float, confidence: float) -> int | None:
        """Return the seeds that make the interval's half width at most `margin`; None if seeds alone never do."""
        for seeds in range(max(2, self.seeds), _MOST_SEEDS):
            if self._with(seeds).half_width(confidence) <= margin:
                return seeds
        return None

    def queries_needed(self, margin: float, confidence: float) -> int | None:
        """Return the queries (in proportion, over all collections) that do the same; None if queries alone never do."""
        for factor in np.geomspace(1, 1000, 61).tolist():
            grown = self._with(self.seeds, factor)
            if grown.half_width(confidence) <= margin:
                return grown.queries
        return None

    def both_needed(self, margin: float, confidence: float) -> tuple[int, int] | None:
        """Return seeds and queries, grown by the same factor, that do the same; None if a thousand seeds do not."""
        for seeds in range(max(2, self.seeds), _MOST_SEEDS):
            grown = self._with(seeds, seeds / self.seeds)
            if grown.half_width(confidence) <= margin:
                return seeds, grown.queries
        return None

    def _with(self, seeds: int, factor: float = 1.0) -> Spread:
        """Return the spread with so many seeds, and `factor` times the queries of every collection."""
        grown = [(variance, queries, math.ceil(queries * factor)) for variance, queries in self.of_queries]
        return Spread(
            self.mean,
            tuple((variance * queries / more, more) for variance, queries, more in grown),
            self.variance_seeds * self.seeds / seeds,
            seeds,
        )


Outcome = Literal["pays", "does not pay", "cannot tell yet"]
Reason = Literal[
    "gain", "no gain", "too dear", "wide interval", "one seed", "one query", "no spread", "short", "rising"
]


@dataclass(frozen=True)
class Verdict:
    """Verdict on one arm; low, high: interval of its gain that holds for all arms together.

    extra_cost: as a share of the baseline's; detectable: smallest true gain that this experiment would have confirmed
    in 80 of 100 cases, None, as is the interval, if the spread is not known; seeds_needed, queries_needed: the number
    of either that alone would settle an open case; both_needed: of both together; None if they would not, or nothing is
    open.
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


@dataclass(frozen=True)
class Training:
    """Training of two arms. epochs: the fewer of both; rising: whether either curve still rises at its end."""

    epochs: float
    rising: bool

    @property
    def missing(self) -> Reason | None:
        """Reason why these runs cannot decide: less than an epoch, or curves that still rise; None if they can."""
        if self.epochs < 1:
            return "short"
        return "rising" if self.rising else None

    def beside(self, other: Training) -> Training:
        """Return the training of both together."""
        return Training(min(self.epochs, other.epochs), self.rising or other.rising)


def difference(arm: Sequence[np.ndarray], baseline: Sequence[np.ndarray]) -> Spread:
    """Return the paired difference; arm, baseline: (S, Q) scores by collection, seeds and queries in the same order."""
    return mean_spread([a - b for a, b in zip(arm, baseline, strict=True)])


def mean_spread(scores: Sequence[np.ndarray]) -> Spread:
    """Return the spread of the average over collections, each (S, Q)."""
    collections, seeds = len(scores), len(scores[0])
    of_query = [each.mean(0) for each in scores]
    of_seed = np.mean([each.mean(1) for each in scores], axis=0)
    return Spread(
        mean=float(np.mean([each.mean() for each in of_query])),
        of_queries=tuple((_variance_of_mean(each) / collections**2, len(each)) for each in of_query),
        variance_seeds=_variance_of_mean(of_seed),
        seeds=seeds,
    )


def _variance_of_mean(values: np.ndarray) -> float:
    """Return the variance of the mean; NaN for a single value."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else math.nan


def randomisation_p(arm: Sequence[np.ndarray], baseline: Sequence[np.ndarray], seed: int = 0) -> float:
    """Return the two-sided p value of a paired randomisation test over queries (scipy's permutation_test).

    Scores are averaged over seeds. Each query weighs so that collections count alike.
    """
    weighted = np.concatenate(
        [(a.mean(0) - b.mean(0)) / a.shape[1] / len(arm) for a, b in zip(arm, baseline, strict=True)]
    )
    # Queries without a difference change no sum; without any there is nothing to test.
    weighted = weighted[weighted != 0]
    if not len(weighted):
        return 1.0
    result = stats.permutation_test(
        (weighted,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        batch=max(1, 4_000_000 // len(weighted)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's step-down method (Holm 1979), in the order given: family-wise error of all."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted.tolist()


def still_rises(steps: np.ndarray, curve: np.ndarray, least: float) -> bool:
    """Return whether a curve still rises at its end; steps, curve: (P,), the first point before training.

    It does if its last stretch adds more than `least`, and more than half of what a straight line from the first point
    to the last would add. A curve of two points is such a line.
    """
    last, share = curve[-1] - curve[-2], (steps[-1] - steps[-2]) / (steps[-1] - steps[0])
    return bool(last > max(least, 0.5 * share * (curve[-1] - curve[0])))


def joint_level(confidence: float, intervals: int) -> float:
    """Return the level of each of so many intervals that makes all of them hold together (Bonferroni)."""
    return 1 - (1 - confidence) / max(1, intervals)


def decide(gain: Spread, extra_cost: float, arms: int, rule: DecideConfig, training: Training | None = None) -> Verdict:
    """Return the verdict on `gain` over the baseline; arms: how many are compared with it.

    It pays if the whole interval lies at or above the smallest gain that is worth the trouble, and the price is right;
    it does not if the whole interval lies below. In between this experiment cannot tell; nor can it if `training` was
    too short for the arms to show what they can do.
    """
    confidence = joint_level(rule.confidence, arms)
    if gain.seeds < 2:
        return Verdict("cannot tell yet", "one seed", gain.mean, None, None, extra_cost, None, seeds_needed=3)
    if any(queries < 2 for _, queries in gain.of_queries):
        return Verdict("cannot tell yet", "one query", gain.mean, None, None, extra_cost, None)
    if not gain.is_known:
        return Verdict("cannot tell yet", "no spread", gain.mean, None, None, extra_cost, None)
    low, high = gain.interval(confidence)
    detectable = gain.detectable(confidence)
    if training and training.missing:
        return Verdict("cannot tell yet", training.missing, gain.mean, low, high, extra_cost, detectable)
    # A gain of nothing is not a gain, even if the user asks for none.
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
