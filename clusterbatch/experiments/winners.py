"""Where the decisive arm gains and where it loses: by the source that query ids name, and by the nearest cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clusterbatch.config import RunConfig
from clusterbatch.experiments.comparison import Comparison
from clusterbatch.experiments.gains import LEAST_QUERIES, segments_of
from clusterbatch.experiments.segments import SEGMENTS
from clusterbatch.experiments.statistics import difference
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.tables import read_parquet

# Clusters shown at each end of the list.
_EXTREMES = 10


def sources_of_queries(config: RunConfig, comparison: Comparison) -> dict[str, np.ndarray]:
    """(Q,) the source that each query's id names, '' where it names none, by collection."""
    pattern = config.report.segment_pattern
    return {name: segments_of(comparison.queries[name], pattern) for name in comparison.collections}


def clusters_of_queries(comparison: Comparison, artifact: Artifact, manifest: Manifest) -> dict[str, np.ndarray]:
    """(Q,) the cluster that each query is nearest to, by collection; empty where that was not found out."""
    part = next((part for part in manifest.parts if part.details.get("content") == SEGMENTS), None)
    if part is None:
        return {}
    table = read_parquet(artifact.folder, part)
    columns = (table[name].to_pylist() for name in ("collection", "query_id", "source", "centroid"))
    cluster = {(name, query): f"{source} {number}" for name, query, source, number in zip(*columns, strict=True)}
    return {
        name: np.array([cluster.get((name, query), "") for query in comparison.queries[name]])
        for name in comparison.collections
    }


def segment_rows(comparison: Comparison, segments: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Gain of the decisive arm by collection and segment, the best first: {collection, segment, queries, gain, low,
    high}; low and high are None with one seed. Queries of the segment '' and segments of few queries are left out."""
    arm, metric = comparison.decisive.name, comparison.metric
    rows = []
    for collection, of_query in segments.items():
        own, reference = (comparison.scores[name][collection, metric] for name in (arm, comparison.reference))
        for segment in sorted(set(of_query.tolist()) - {""}):
            chosen = of_query == segment
            if chosen.sum() < LEAST_QUERIES:
                continue
            spread = difference([own[:, chosen]], [reference[:, chosen]])
            low, high = spread.interval(comparison.confidence) if spread.is_known else (None, None)
            entry = {"collection": collection, "segment": segment, "queries": int(chosen.sum())}
            rows.append({**entry, "gain": spread.mean, "low": low, "high": high})
    return sorted(rows, key=lambda row: -row["gain"])


def extremes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clusters that gain and lose most."""
    return rows if len(rows) <= 2 * _EXTREMES else [*rows[:_EXTREMES], *rows[-_EXTREMES:]]
