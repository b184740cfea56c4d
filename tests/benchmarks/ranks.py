"""Do rows that are predicted high come out high? Rank correlations with intervals, and leave-one-out, of few rows.

N rows (sources of a corpus), F features of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation of N pairs; its interval by resampling the pairs, its p value by permuting one."""

    rho: float
    low: float
    high: float
    p: float


def agreement(predicted: np.ndarray, measured: np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Agreement:
    """predicted, measured: (N,)."""
    random, count = np.random.default_rng(seed), len(predicted)
    rho = _spearman(predicted, measured)
    resampled = [
        _spearman(predicted[rows], measured[rows]) for rows in random.integers(count, size=(_RESAMPLES, count))
    ]
    permuted = np.array([_spearman(predicted, random.permutation(measured)) for _ in range(_RESAMPLES)])
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    p = (1 + np.sum(np.abs(permuted) >= abs(rho) - 1e-12)) / (1 + _RESAMPLES)
    return Agreement(rho, float(low), float(high), float(p))


@dataclass(frozen=True)
class LeftOut:
    """Of predictions for rows left out. rho: their rank correlation with what was measured; chance_mean, chance_high:
    mean and 97.5 % quantile of the same where features and outcomes are shuffled against each other; p: one-sided."""

    rho: float
    chance_mean: float
    chance_high: float
    p: float


def leave_one_out(features: np.ndarray, outcome: np.ndarray, *, permutations: int = 500, seed: int = 0) -> LeftOut:
    """features: (N, F), outcome: (N,)."""
    random = np.random.default_rng(seed)
    rho = _spearman(left_out(features, outcome[:, None])[:, 0], outcome)
    chance = []
    for _ in range(permutations):
        shuffled = random.permutation(outcome)
        chance.append(_spearman(left_out(features, shuffled[:, None])[:, 0], shuffled))
    p = (1 + np.sum(np.array(chance) >= rho - 1e-12)) / (1 + permutations)
    return LeftOut(rho, float(np.mean(chance)), float(np.quantile(chance, 0.975)), float(p))


def left_out(features: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Return what is learned of each row from the others, (N, A); features: (N, F), outcomes: (N, A).

    The penalty is as heavy as if each feature had been seen to do nothing as often as it was seen at all.
    """
    regression = make_pipeline(StandardScaler(), Ridge(alpha=len(features) - 1))
    return np.asarray(cross_val_predict(regression, features, outcomes, cv=LeaveOneOut())).reshape(outcomes.shape)


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    """0 where one of them is constant: it says nothing."""
    left, right = stats.rankdata(left), stats.rankdata(right)
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
