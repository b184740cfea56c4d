"""What training changed, before against after, with intervals over queries, by collection and by segment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc
from scipy import stats

from clusterbatch.config import RunConfig
from clusterbatch.evaluation.models import AFTER, BEFORE
from clusterbatch.evaluation.results import read_scores
from clusterbatch.store.workspace import Workspace

_CONFIDENCE = 0.95
# Segments with fewer queries say too little.
LEAST_QUERIES = 20


def segments_of(queries: Iterable[str], pattern: str) -> np.ndarray:
    """(Q,) names by report.segment_pattern, '' where an id names none."""
    compiled = re.compile(pattern)
    matches = (compiled.match(query) for query in queries)
    return np.array([match[1] if match else "" for match in matches])


def paired_interval(after: np.ndarray, before: np.ndarray) -> tuple[float, float] | None:
    """Interval of the mean difference for other queries of the same kind (paired t, scipy); (Q,) scores each.

    None of a single query, which says nothing of any other. Another seed of the training is another matter: `compare`
    measures that.
    """
    if len(after) < 2:
        return None
    if np.array_equal(after, before):
        return 0.0, 0.0
    low, high = stats.ttest_rel(after, before).confidence_interval(_CONFIDENCE)
    return float(low), float(high)


def query_gains(
    config: RunConfig, generation: int
) -> tuple[dict[tuple[str, str], tuple[float, float] | None], list[dict[str, Any]]]:
    """Intervals by (collection, metric), None of a single query; and, for the first metric, one row per segment:
    {collection, segment, queries, gain, low, high}, the best first. Empty where an evaluation lacks before or after."""
    artifact = Workspace(config).evaluation(generation)
    manifest = artifact.require()
    if not {BEFORE, AFTER} <= set(manifest.details["models"]):
        return {}, []
    table = read_scores(artifact, manifest)
    keys = list(dict.fromkeys((row["collection"], row["metric"]) for row in manifest.details["table"]))
    intervals: dict[tuple[str, str], tuple[float, float] | None] = {}
    segments: list[dict[str, Any]] = []
    leading = keys[0][1]
    for collection, metric in keys:
        of_key = table.filter(pc.and_(pc.equal(table["collection"], collection), pc.equal(table["metric"], metric)))
        before, after = (of_key.filter(pc.equal(of_key["model"], model)) for model in (BEFORE, AFTER))
        # Both models answered the same queries in the same order: that of the judgements.
        assert before["query_id"].equals(after["query_id"])
        own, reference = after["value"].to_numpy(), before["value"].to_numpy()
        intervals[collection, metric] = paired_interval(own, reference)
        if metric != leading:
            continue
        names = segments_of(before["query_id"].to_pylist(), config.report.segment_pattern)
        for name in sorted(set(names.tolist()) - {""}):
            chosen = names == name
            if chosen.sum() >= LEAST_QUERIES:
                interval = paired_interval(own[chosen], reference[chosen])
                assert interval is not None, "a segment has several queries"
                gain = float(np.mean(own[chosen] - reference[chosen]))
                entry = {"collection": collection, "segment": name, "queries": int(chosen.sum())}
                segments.append({**entry, "gain": gain, "low": interval[0], "high": interval[1]})
    return intervals, sorted(segments, key=lambda row: -row["gain"])
