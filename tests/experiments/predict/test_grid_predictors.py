"""Fits that leave each corpus out, against scikit-learn's; what is printed of the cells of an arm."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from scipy.stats import spearmanr, t
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from clusterbatch.experiments.compare.statistics import Spread
from tests.benchmarks.grid_predictors import judge, left_out
from tests.benchmarks.grid_report import Cell

CORPORA = ["a", "a-by-query", "b", "b", "c", "c-by-query", "d", "d", "e", "e"]
# Hold-outs of one corpus are left out together.
GROUPS = np.array([name[0] for name in CORPORA])
NAMES = ["loss", "wrong", "answers"]


@pytest.fixture
def figures() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(CORPORA), len(NAMES)))


@pytest.fixture
def gains(figures: np.ndarray) -> np.ndarray:
    return figures @ [0.02, -0.01, 0.0] + 0.005 * np.random.default_rng(1).standard_normal(len(figures))


def test_a_fit_never_sees_the_corpus_that_it_foretells(figures: np.ndarray, gains: np.ndarray) -> None:
    expected = cross_val_predict(LinearRegression(), figures, gains, groups=GROUPS, cv=LeaveOneGroupOut())
    assert left_out(figures, gains, GROUPS) == pytest.approx(expected)


def test_correlations_and_signs(figures: np.ndarray, gains: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    # An error of .005 with 99 degrees of freedom.
    cells = [
        Cell(name, 32, "cluster-4x", 0.003, 3, 100, 0.5, 0.5, Spread(gain, ((0.005**2, 100),), 0.0, 3))
        for name, gain in zip(CORPORA, gains.tolist(), strict=True)
    ]
    judge("cluster-4x", cells, NAMES, figures)
    lines = {(line["figure"], line["case"]): line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for place, name in enumerate(NAMES):
        line = lines["grid, rank correlation of a figure and the measured gain", f"cluster-4x, {name}"]
        assert line["value"] == pytest.approx(spearmanr(figures[:, place], gains).statistic, rel=1e-4)
        kept = [figures[each != GROUPS, place] for each in "abcde"]
        without = [spearmanr(own, gains[each != GROUPS]).statistic for own, each in zip(kept, "abcde", strict=True)]
        found = line["lowest_without_a_corpus"], line["highest_without_a_corpus"]
        assert found == pytest.approx((min(without), max(without)), rel=1e-4)
    foretold = cross_val_predict(LinearRegression(), figures, gains, groups=GROUPS, cv=LeaveOneGroupOut())
    sure = [place for place in range(len(gains)) if abs(gains[place]) > t.ppf(0.975, 99) * 0.005]
    assert 2 < len(sure) < len(gains)
    line = lines["grid, gain foretold by a fit to the other corpora", "cluster-4x, all figures"]
    assert line["value"] == pytest.approx(spearmanr(foretold, gains).statistic, rel=1e-4)
    assert line["signs_right"] == pytest.approx(
        np.mean([foretold[place] * gains[place] > 0 for place in sure]), rel=1e-4
    )
    assert line["cells_beyond_noise"] == len(sure)
    assert line["gains_among_them"] == sum(gains[place] > 0 for place in sure)
