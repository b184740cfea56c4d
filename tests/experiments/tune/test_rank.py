"""The statistics of the benchmark that asks whether `predict` agrees with real gains."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks import ranks
from tests.benchmarks.ranks import agreement, leave_one_out, left_out

RANDOM = np.random.default_rng(1)
FEATURES = RANDOM.normal(size=(20, 4))


def test_a_relation_is_found_and_its_absence_is_not() -> None:
    outcome = 3 * FEATURES[:, 1] - FEATURES[:, 2] + 0.1 * RANDOM.normal(size=20)
    found = leave_one_out(FEATURES, outcome, permutations=25)
    assert found.rho > 0.8
    assert found.p < 0.05
    assert found.rho > found.chance_high
    nothing = leave_one_out(FEATURES, RANDOM.normal(size=20), permutations=25)
    assert nothing.p > 0.05
    # What is left out pulls the mean of the others away from itself: chance is below zero.
    assert nothing.chance_mean < 0


def test_ranks_alone_count_and_the_interval_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_RESAMPLES", 400)
    values = RANDOM.normal(size=30)
    same = agreement(values, np.exp(values))
    assert same.rho == 1.0
    assert same.p < 0.01
    other = agreement(values, RANDOM.normal(size=30))
    assert other.low < other.rho < other.high
    assert agreement(np.ones(30), values).rho == 0.0


def test_a_row_left_out_does_not_count_for_itself() -> None:
    features, outcome = np.random.default_rng(1).normal(size=(2, 20, 4))
    before = left_out(features, outcome)
    outcome[7] += 100.0
    after = left_out(features, outcome)
    np.testing.assert_allclose(after[7], before[7])
    assert not np.allclose(after[6], before[6])


def test_what_is_left_out_is_foretold_by_ridge_on_the_others() -> None:
    random = np.random.default_rng(2)
    features, outcome = random.normal(size=(12, 3)), random.normal(size=(12, 2))
    known, asked = np.delete(features, 5, axis=0), features[5]
    scaled = (known - known.mean(axis=0)) / known.std(axis=0)
    centre = np.delete(outcome, 5, axis=0).mean(axis=0)
    weights = np.linalg.solve(scaled.T @ scaled + 11 * np.eye(3), scaled.T @ (np.delete(outcome, 5, axis=0) - centre))
    expected = centre + (asked - known.mean(axis=0)) / known.std(axis=0) @ weights
    np.testing.assert_allclose(left_out(features, outcome)[5], expected)
