"""Which neighbours become negatives: ranks, limits by the positive's score, and the ways to pick."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from clusterbatch.config import MineConfig
from clusterbatch.search import negatives as choose
from clusterbatch.search.negatives import choose_negatives

RANDOM = np.random.default_rng(0)


def _scores(queries: int = 200, candidates: int = 40) -> np.ndarray:
    return -np.sort(-RANDOM.uniform(0.2, 0.9, (queries, candidates)).astype(np.float32), axis=1)


def _choose(scores: np.ndarray, positive: Any, **settings: Any) -> np.ndarray:
    config = MineConfig.model_validate({"negatives": 4, "first": 3, "last": 30, "most_of_positive": None, **settings})
    draws = np.random.default_rng(1).random(scores.shape)
    return choose_negatives(scores, np.broadcast_to(np.float32(positive), len(scores)), draws, config)


def _choose_slice(scores: np.ndarray, rows: slice, **settings: Any) -> np.ndarray:
    config = MineConfig.model_validate({"negatives": 4, "most_of_positive": None, **settings})
    draws = np.random.default_rng(1).random(scores.shape)
    return choose_negatives(scores[rows], np.full(len(scores[rows]), 0.9, np.float32), draws[rows], config)


def test_hardest_are_the_first_of_the_range() -> None:
    assert np.all(_choose(_scores(), 1.0, pick="hardest") == [3, 4, 5, 6])


@pytest.mark.parametrize("pick", ["random", "balanced"])
def test_picks_lie_in_the_range_and_differ(pick: str) -> None:
    chosen = _choose(_scores(), 1.0, pick=pick)
    assert chosen.min() >= 3
    assert chosen.max() < 30
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    # All of the range comes up.
    assert len(np.unique(chosen)) == 27


def test_balanced_takes_one_of_each_quarter_of_the_margins() -> None:
    scores = _scores(50)
    # Most candidates are close to the positive, a few far: random picks would seldom be far.
    scores[:, 3:27] = -np.sort(-RANDOM.uniform(0.79, 0.8, (50, 24)).astype(np.float32), axis=1)
    scores[:, 27:30] = [0.7, 0.6, 0.5]
    for row, chosen in zip(scores, _choose(scores, 0.9, pick="balanced"), strict=True):
        margins = 0.9 - row[chosen]
        edges = np.clip(((margins - 0.1) / 0.3 * 4).astype(int), 0, 3)
        assert sorted(edges.tolist()) == [0, 1, 2, 3]


def test_many_queries_take_little_memory_and_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = _scores(3000, 64)
    scores[::7, 40:] = -np.inf
    settings = {"pick": "balanced", "last": 60, "margin": 0.1}
    alone = np.concatenate([_choose_slice(scores, slice(row, row + 1), **settings) for row in range(200)])
    monkeypatch.setattr(choose, "_BLOCK_PAIRS", 2**18)
    tracemalloc.start()
    together = _choose_slice(scores, slice(0, 3000), **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(together[:200], alone)
    # A flag for each pair of a query's candidates, of all queries at once, would be more than that.
    assert peak < 3000 * 64 * 64


def test_limits_follow_the_positive() -> None:
    scores = _scores()
    chosen = _choose(scores, 0.6, most_of_positive=0.95)
    found = np.where(chosen >= 0, np.take_along_axis(scores, np.maximum(chosen, 0), 1), -1)
    assert found.max() <= 0.95 * 0.6 + 1e-6
    chosen = _choose(scores, 0.6, margin=0.2)
    found = np.where(chosen >= 0, np.take_along_axis(scores, np.maximum(chosen, 0), 1), -1)
    assert found.max() <= 0.4 + 1e-6
    # A positive that nothing scores below leaves none, nor does a range that is empty.
    assert np.all(_choose(scores, 0.0, margin=0.1) == -1)
    assert np.all(_choose(np.full((2, 5), -np.inf, np.float32), 1.0) == -1)


def test_fewer_candidates_than_negatives_are_all_taken() -> None:
    chosen = _choose(_scores(3, 5), 1.0, last=10)
    assert np.sort(chosen, axis=1).tolist() == [[-1, -1, 3, 4]] * 3


def test_a_range_too_small_for_the_negatives_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer ranks"):
        MineConfig(negatives=5, first=10, last=12)
