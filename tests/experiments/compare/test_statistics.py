from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clusterbatch.config.compare import DecideConfig
from clusterbatch.experiments.compare.statistics import (
    Spread,
    decide,
    difference,
    holm,
    joint_level,
    mean_spread,
    randomisation_p,
    still_rises,
)


def experiment(
    rng, gain: float, seeds: int = 4, queries: int = 300, seed_noise: float = 0.004, query_noise: float = 0.1
):
    """Scores (S, Q) of a baseline and an arm that is better by `gain`, with noise of both kinds."""
    ability = rng.beta(2, 2, queries)
    base = ability + seed_noise * rng.normal(size=(seeds, 1))
    effect = gain + query_noise * rng.normal(size=queries) + seed_noise * rng.normal(size=(seeds, 1))
    return base + effect, base


def test_without_noise_between_seeds_it_is_the_paired_t_test_over_queries():
    rng = np.random.default_rng(0)
    arm, base = experiment(rng, 0.02, seed_noise=0)
    spread = difference([arm], [base])
    expected = stats.ttest_rel(arm.mean(0), base.mean(0))
    assert spread.mean == pytest.approx((arm - base).mean())
    assert spread.p_value() == pytest.approx(expected.pvalue, rel=1e-6)
    assert spread.interval(0.95) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6)


def test_without_noise_between_queries_it_is_the_t_test_over_seeds():
    rng = np.random.default_rng(1)
    arm, base = experiment(rng, 0.02, seed_noise=0.01, query_noise=0)
    spread = difference([arm], [base])
    assert spread.p_value() == pytest.approx(stats.ttest_1samp((arm - base).mean(1), 0).pvalue, rel=1e-6)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        low, high = difference(*([part] for part in experiment(rng, 0.01, seeds=3))).interval(0.9)
        covered += low <= 0.01 <= high
    # 90 % of 300 is 270, with a standard deviation of 5; the sum of both variances errs on the safe side.
    assert covered >= 255


@pytest.mark.parametrize("queries", [(5, 1000), (1000, 1000)])
def test_intervals_over_several_collections_hold_as_often_as_they_say(queries: tuple[int, ...]):
    rng = np.random.default_rng(6)
    covered, repeats = 0, 600
    for _ in range(repeats):
        shift = 0.002 * rng.normal(size=(3, 1))
        spread = mean_spread([0.1 * rng.normal(size=(1, each)) + shift for each in queries])
        low, high = spread.interval(0.95)
        covered += low <= 0 <= high
    # 95 % of 600 is 570, with a standard deviation of 5.3.
    assert covered >= 0.93 * repeats


def test_a_collection_of_one_query_has_no_interval_and_no_verdict():
    rng = np.random.default_rng(7)
    spread = mean_spread([0.5 + 0.01 * rng.normal(size=(3, 1)), 0.5 + 0.01 * rng.normal(size=(3, 1000))])
    assert not spread.is_known
    assert math.isnan(spread.freedom)
    assert all(math.isnan(end) for end in spread.interval(0.95))
    verdict = decide(spread, 0.0, 1, DecideConfig())
    assert (verdict.outcome, verdict.reason) == ("cannot tell yet", "one query")
    assert (verdict.low, verdict.high, verdict.detectable) == (None, None, None)


def test_collections_count_alike_whatever_their_size():
    small, large = np.full((2, 10), 0.4), np.full((2, 1000), 0.2)
    assert mean_spread([small, large]).mean == pytest.approx(0.3)


def test_randomisation_agrees_with_the_t_test_where_its_assumptions_hold():
    rng = np.random.default_rng(3)
    arm, base = experiment(rng, 0.012, seed_noise=0)
    expected = stats.ttest_rel(arm.mean(0), base.mean(0)).pvalue
    assert randomisation_p([arm], [base]) == pytest.approx(expected, abs=0.02)
    assert randomisation_p([base], [base]) == 1.0


def test_holm_against_hand_calculation():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_needed_seeds_and_queries_really_narrow_the_interval():
    spread = Spread(0.01, of_queries=((4e-6, 400),), variance_seeds=9e-6, seeds=3)
    seeds = spread.seeds_needed(0.006, 0.95)
    assert seeds is not None
    narrowed = Spread(0.01, ((4e-6, 400),), 9e-6 * 3 / seeds, seeds)
    assert narrowed.half_width(0.95) <= 0.006
    assert Spread(0.01, ((4e-6, 400),), 9e-6 * 3 / (seeds - 1), seeds - 1).half_width(0.95) > 0.006
    # No number of seeds removes what the queries leave open.
    assert spread.seeds_needed(0.003, 0.95) is None
    assert spread.queries_needed(0.003, 0.95) is None
    # Both together do.
    seeds, queries = spread.both_needed(0.003, 0.95)
    assert queries == math.ceil(400 * seeds / 3)
    assert Spread(0.01, ((4e-6 * 400 / queries, queries),), 9e-6 * 3 / seeds, seeds).half_width(0.95) <= 0.003


def test_needed_queries_are_those_of_all_collections_in_proportion():
    of_queries = ((4e-6, 20), (1e-8, 1000))
    queries = Spread(0.01, of_queries, variance_seeds=1e-8, seeds=5).queries_needed(0.002, 0.95)
    assert queries is not None
    factor = queries / 1020
    grown = tuple((variance / factor, round(count * factor)) for variance, count in of_queries)
    assert Spread(0.01, grown, 1e-8, 5).half_width(0.95) == pytest.approx(0.002, rel=0.2)


@pytest.mark.parametrize(
    ("gain", "outcome", "reason"),
    [(0.05, "pays", "gain"), (-0.02, "does not pay", "no gain"), (0.006, "cannot tell yet", "wide interval")],
)
def test_verdicts(gain, outcome, reason):
    verdict = decide(Spread(gain, ((1e-6, 1000),), 1e-6, 5), 0.5, 2, DecideConfig(min_gain=0.005))
    assert (verdict.outcome, verdict.reason) == (outcome, reason)
    assert verdict.low < gain < verdict.high


def test_a_gain_that_costs_too_much_does_not_pay():
    rule = DecideConfig(min_gain=0.005, max_cost=0.2)
    spread = Spread(0.05, ((1e-6, 1000),), 1e-6, 5)
    assert decide(spread, 0.5, 1, rule).reason == "too dear"
    assert decide(spread, 0.1, 1, rule).outcome == "pays"


def test_one_seed_never_decides():
    arm, base = experiment(np.random.default_rng(4), 0.3, seeds=1)
    spread = difference([arm], [base])
    verdict = decide(spread, 0.0, 1, DecideConfig())
    assert (verdict.outcome, verdict.reason) == ("cannot tell yet", "one seed")
    assert math.isnan(spread.freedom)


def test_arms_that_do_not_differ_are_seldom_said_to_pay():
    rng = np.random.default_rng(5)
    claims = 0
    for _ in range(200):
        arm, base = experiment(rng, 0.0, seeds=3)
        claims += decide(difference([arm], [base]), 0.0, 1, DecideConfig(min_gain=0.0)).outcome == "pays"
    assert claims <= 10


@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_scores_that_do_not_vary_are_no_certainty(gain: float):
    """Three hits of three by every seed, or two arms with the same vectors."""
    spread = difference([np.full((2, 3), gain)], [np.zeros((2, 3))])
    assert not spread.is_known
    verdict = decide(spread, 0.0, 1, DecideConfig())
    assert (verdict.outcome, verdict.reason) == ("cannot tell yet", "no spread")
    assert (verdict.low, verdict.high, verdict.detectable) == (None, None, None)
    assert math.isnan(spread.p_value())


def test_intervals_of_picked_rows_hold_together():
    """Nothing differs: of 100 clusters, the ten that gain most and least seldom have an interval without 0."""
    rng, wrong, alone, repeats = np.random.default_rng(8), 0, 0, 60
    for _ in range(repeats):
        shift = 0.01 * rng.normal(size=(3, 1))
        spreads = [mean_spread([0.1 * rng.normal(size=(3, 30)) + shift]) for _ in range(100)]
        extreme = sorted(spreads, key=lambda spread: spread.mean)
        picked = extreme[:10] + extreme[-10:]

        def excludes_zero(level: float, picked: list[Spread] = picked) -> bool:
            return any(abs(spread.mean) > spread.half_width(level) for spread in picked)

        wrong += excludes_zero(joint_level(0.95, 100))
        alone += excludes_zero(0.95)
    assert wrong <= 0.05 * repeats + 3
    # What would be shown without the correction.
    assert alone > 0.3 * repeats


@pytest.mark.parametrize(
    ("curve", "rises"),
    [
        ([0.2, 0.3, 0.4, 0.5], True),  # a straight line
        ([0.2, 0.4, 0.45, 0.46], False),
        ([0.2, 0.4, 0.45, 0.54], True),
        ([0.2, 0.5, 0.4, 0.35], False),
        ([0.4, 0.4, 0.401, 0.404], False),  # by less than anybody asks for
    ],
)
def test_curves_rise_if_their_end_does(curve: list[float], rises: bool):
    assert still_rises(np.array([0, 10, 20, 30]), np.array(curve), 0.005) == rises


def test_a_curve_of_one_point_is_not_flat():
    assert still_rises(np.array([0, 30]), np.array([0.2, 0.5]), 0.005)
    assert not still_rises(np.array([0, 30]), np.array([0.5, 0.2]), 0.005)
