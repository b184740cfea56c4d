"""The statistics of the benchmark that asks whether `predict` agrees with real gains."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.ranks import agreement, leave_one_out

RANDOM = np.random.default_rng(1)
FEATURES = RANDOM.normal(size=(20, 4))


def test_a_relation_is_found_and_its_absence_is_not() -> None:
    outcome = 3 * FEATURES[:, 1] - FEATURES[:, 2] + 0.1 * RANDOM.normal(size=20)
    found = leave_one_out(FEATURES, outcome, permutations=40)
    assert found.rho > 0.8
    assert found.p < 0.05
    assert found.rho > found.chance_high
    nothing = leave_one_out(FEATURES, RANDOM.normal(size=20), permutations=40)
    assert nothing.p > 0.05
    # What is left out pulls the mean of the others away from itself: chance is below zero.
    assert nothing.chance_mean < 0


def test_ranks_alone_count_and_the_interval_holds_them() -> None:
    values = RANDOM.normal(size=30)
    same = agreement(values, np.exp(values))
    assert same.rho == 1.0
    assert same.p < 0.01
    other = agreement(values, RANDOM.normal(size=30))
    assert other.low < other.rho < other.high
    assert agreement(np.ones(30), values).rho == 0.0
