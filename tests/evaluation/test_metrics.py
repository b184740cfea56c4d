from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest

from clusterbatch.errors import UsageError
from clusterbatch.evaluation.metrics import parse_metric, per_query

JUDGEMENTS = {"q1": {"a": 3, "b": 1, "z": 0}, "q2": {"c": 1}, "q3": {"d": 1}}
ANSWERS = {"q1": ["b", "x", "a"], "q2": ["x", "y", "c"]}


def values(*names: str) -> dict[str, list[float]]:
    found = per_query([parse_metric(name) for name in names], JUDGEMENTS, ANSWERS)
    return {name: column.tolist() for name, column in found.items()}


def test_against_hand_calculation():
    found = values("NDCG@10", "MRR@10", "Recall@3", "MAP@10", "HitRate@1", "Precision@2")
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert found["NDCG@10"] == pytest.approx([(1 + 3 / math.log2(4)) / ideal, 1 / math.log2(4), 0], abs=1e-12)
    assert found["MRR@10"] == pytest.approx([1, 1 / 3, 0])
    assert found["Recall@3"] == pytest.approx([1, 1, 0])
    assert found["MAP@10"] == pytest.approx([(1 + 2 / 3) / 2, 1 / 3, 0])
    assert found["HitRate@1"] == pytest.approx([1, 0, 0])
    assert found["Precision@2"] == pytest.approx([0.5, 0, 0])


def test_a_query_without_an_answer_counts_zero():
    found = per_query([parse_metric("NDCG@10")], JUDGEMENTS, {"q1": ["a", "b"]})["NDCG@10"]
    assert found.tolist() == [1, 0, 0]
    assert per_query([parse_metric("NDCG@10")], JUDGEMENTS, {})["NDCG@10"].tolist() == [0, 0, 0]


def test_names_are_taken_in_any_case():
    assert [parse_metric(name).name for name in ("ndcg@5", "Hitrate@10", "recall@2")] == [
        "NDCG@5",
        "HitRate@10",
        "Recall@2",
    ]


def test_a_function_of_the_users_own(monkeypatch):
    module = types.ModuleType("own_measures")
    module.first_grade = lambda answers, grades: grades.get(answers[0], 0) if answers else -1
    module.broken = lambda answers, grades: float("nan")
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_measures", module)
    assert values("own_measures:first_grade")["own_measures:first_grade"] == [1, 0, -1]
    with pytest.raises(UsageError, match="'own_measures:broken' returned nan"):
        values("own_measures:broken")
    with pytest.raises(UsageError, match="is not a function"):
        parse_metric("own_measures:number")


@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), np.int64(1), np.True_, True])
def test_a_function_may_return_any_of_numpys_numbers(monkeypatch, value):
    module = types.ModuleType("own_measures")
    module.constant = lambda answers, grades: value
    monkeypatch.setitem(sys.modules, "own_measures", module)
    assert values("own_measures:constant")["own_measures:constant"] == [float(value)] * 3


@pytest.mark.parametrize("name", ["NDCG", "nDCG@0", "Accuracy@3", "no_such_module:f", "math:no_such_function"])
def test_what_is_no_measure_is_refused(name):
    with pytest.raises(UsageError, match=r"evaluate\.metrics"):
        parse_metric(name)


def test_ties_follow_the_order_that_is_handed_in():
    # The library would sort equal scores by document id, descending; it is given ranks, so the order stays.
    judgements = {"q": {"a": 1}}
    assert per_query([parse_metric("MRR@2")], judgements, {"q": ["a", "z"]})["MRR@2"].tolist() == [1]
    assert per_query([parse_metric("MRR@2")], judgements, {"q": ["z", "a"]})["MRR@2"] == np.array([0.5])
