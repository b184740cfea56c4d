"""Retrieval measures per query, computed by pytrec_eval (through ir_measures), the measuring program of BEIR and TREC.

Averages are over all judged queries; a query without an answer counts 0. NDCG has linear gain, grade / log2(rank + 1).
The library is handed ranks, not scores, so the order is the one `search` states and no second tie-break applies.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import ir_measures
import numpy as np

from clusterbatch.errors import UsageError

# This project's names (the field's, and MTEB's) for those of ir_measures.
_LIBRARY_NAMES = {"NDCG": "nDCG", "MRR": "RR", "RECALL": "R", "PRECISION": "P", "MAP": "AP", "HITRATE": "Success"}
_SPELLINGS = {"NDCG": "NDCG", "MRR": "MRR", "RECALL": "Recall", "PRECISION": "Precision", "MAP": "MAP"}
_NAME = re.compile(r"([A-Za-z]+)@(\d+)")

Grades = Mapping[str, int]
# A user's own measure: ids of the answers, best first, and grade by document id, to a number.
Measure = Callable[[Sequence[str], Grades], float]


@dataclass(frozen=True)
class Metric:
    """`name` as tables show it; `cutoff` is how many answers it looks at, None if a user's function decides."""

    name: str
    cutoff: int | None
    library: Any = None
    function: Measure | None = None


def parse_metric(name: str) -> Metric:
    """`NDCG@10`, `MRR@10`, `Recall@100`, `Precision@5`, `MAP@100`, `HitRate@10`, or `module:function` of the user's.

    Raises UsageError if it is none of these or the function cannot be found.
    """
    if ":" in name:
        return Metric(name, None, function=_load(name))
    match = _NAME.fullmatch(name)
    kind = match[1].upper() if match else ""
    if match is None or kind not in _LIBRARY_NAMES or int(match[2]) < 1:
        raise UsageError(
            f"evaluate.metrics: {name!r} is not a measure; expected one of "
            "NDCG@k, MRR@k, Recall@k, Precision@k, MAP@k, HitRate@k, or module:function"
        )
    cutoff = int(match[2])
    library = ir_measures.parse_measure(f"{_LIBRARY_NAMES[kind]}@{cutoff}")
    return Metric(f"{_SPELLINGS.get(kind, 'HitRate')}@{cutoff}", cutoff, library=library)


def parse_metrics(names: Sequence[str]) -> list[Metric]:
    """Return the measures in order, each once, however it is spelt. Raises UsageError as `parse_metric` does."""
    return list({metric.name: metric for metric in map(parse_metric, names)}.values())


def per_query(
    metrics: Sequence[Metric], judgements: Mapping[str, Grades], answers: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """(Q,) float64 by metric name, in the order of `judgements`.

    answers: document ids by query id, best first; queries without an entry score 0 with every library measure.
    """
    values = {metric.name: np.zeros(len(judgements)) for metric in metrics}
    position = {query: row for row, query in enumerate(judgements)}
    library = {metric.library: metric.name for metric in metrics if metric.library is not None}
    if library and judgements:
        run = {
            query: {document: float(-rank) for rank, document in enumerate(documents)}
            for query, documents in answers.items()
        }
        evaluator = ir_measures.evaluator(list(library), judgements)
        for result in evaluator.iter_calc(run):
            values[library[result.measure]][position[result.query_id]] = result.value
    for metric in metrics:
        if metric.function is not None:
            for query, row in position.items():
                values[metric.name][row] = _call(metric, answers.get(query, ()), judgements[query])
    return values


def _load(name: str) -> Measure:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"evaluate.metrics: {name!r} cannot be loaded ({error}; is it on PYTHONPATH?)") from None
    if not callable(function):
        raise UsageError(f"evaluate.metrics: {name!r} is not a function")
    loaded: Measure = function
    return loaded


def _call(metric: Metric, documents: Sequence[str], grades: Grades) -> float:
    assert metric.function is not None
    value: Any = metric.function(documents, grades)
    # Of numpy's numbers only float64 is a float.
    if not isinstance(value, (Real, np.bool_)) or not math.isfinite(value):
        raise UsageError(f"evaluate.metrics: {metric.name!r} returned {value!r}, expected a finite number")
    return float(value)
