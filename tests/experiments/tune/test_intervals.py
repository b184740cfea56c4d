"""Old and new, gains and the recommendation, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from clusterbatch.experiments.tune.intervals import months_of, recommend, summarise

# One query of each of months 0 to 2, and one of none; months 1 and 2.
_ARRIVAL = np.array([0, 1, 2, -1])
_NEVER = np.array([[[0.8, 0.2, 0.1, 9.0], [0.6, 0.4, 0.3, 9.0]]])
_OFTEN = np.array([[[0.7, 0.5, 0.1, 9.0], [0.5, 0.5, 0.6, 9.0]]])


def test_a_query_is_new_once_and_then_old() -> None:
    assert months_of(_NEVER, _ARRIVAL) == [(0.8, 0.2), (pytest.approx(0.5), 0.3)]
    found = summarise({"never": _NEVER, "often": _OFTEN}, _ARRIVAL, {"never": 1.0, "often": 3.0}, 0.95)
    # Old: query 0 in both months, query 1 in the second; new: queries 1 and 2.
    assert found["never"]["old"] == pytest.approx((0.7 + 0.4) / 2)
    assert found["never"]["new"] == pytest.approx((0.2 + 0.3) / 2)
    assert found["often"]["value"] == pytest.approx(((0.6 + 0.5) / 2 + (0.5 + 0.6) / 2) / 2)
    assert found["often"]["gain"] == pytest.approx(found["often"]["value"] - found["never"]["value"])
    assert (found["never"]["gain"], found["often"]["low"]) == (None, None)


def test_intervals_need_seeds_and_hold_the_gain() -> None:
    random = np.random.default_rng(0)
    arrival = np.repeat([0, 1, 2], 50)
    never = random.random((3, 2, 150))
    often = never + 0.1 + random.normal(0, 0.02, never.shape)
    found = summarise({"never": never, "often": often}, arrival, {"never": 1.0, "often": 2.0}, 0.95)["often"]
    assert 0 < found["low"] < 0.1 < found["high"] < 0.2


def test_intervals_of_several_policies_hold_together() -> None:
    """Nothing differs: among twelve policies, some interval seldom leaves out 0."""
    random, arrival, repeats = np.random.default_rng(1), np.repeat([0, 1, 2], 40), 100
    costs = {f"every {number}": 1.0 for number in range(12)}
    wrong = 0
    for _ in range(repeats):
        queries = random.random((1, 2, 120))
        scores = {name: queries + 0.05 * random.normal(size=(4, 2, 120)) for name in costs}
        found = summarise(scores, arrival, costs, 0.95)
        wrong += any(row["low"] is not None and not row["low"] <= 0 <= row["high"] for row in found.values())
    assert wrong <= 0.05 * repeats + 4


@pytest.mark.parametrize(("margin", "chosen"), [(0.0, "often"), (0.02, "rarely"), (0.5, "never")])
def test_the_cheapest_within_the_margin_is_taken(margin: float, chosen: str) -> None:
    policies = {
        "never": {"value": 0.40, "cost": 1.0},
        "rarely": {"value": 0.59, "cost": 2.0},
        "often": {"value": 0.60, "cost": 5.0},
    }
    name, why = recommend(policies, margin)
    assert name == chosen
    assert ("often is better" in why) == (chosen != "often")
    assert ("never 0.4000" in why) == (chosen != "never")
