"""Rows of the comparison's table, as figures; how they are written is the template's matter.

Which cluster a test query is nearest to: winners and losers among clusters, also where ids name no source.

Where the decisive arm gains and where it loses: by the source that query ids name, and by the nearest cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.config.experiments import Language
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.vectors import vector_values
from clusterbatch.encoder.devices import visible_device
from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation.collection import Collection
from clusterbatch.experiments.compare.results import ArmResult, Comparison
from clusterbatch.experiments.compare.statistics import difference
from clusterbatch.experiments.compare.wording import verdict_word
from clusterbatch.pipeline.report import LEAST_QUERIES, segments_of
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

# What the part of a comparison is called that holds them.
SEGMENTS = "segments"
_SCHEMA = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        # Number of the centroid inside the source, in the fit's order.
        pa.field("centroid", pa.int32(), nullable=False),
    ]
)


def query_segments(config: RunConfig, clusters: Artifact, collections: Sequence[Collection]) -> pa.Table:
    """Of every judged query the centroid, of any source, that its surrogate's vector is nearest to.

    Columns collection, query_id, source, centroid. No rows where queries have no vectors comparable with the centroids:
    the user's own vectors, character n-grams, features of both sides, a projection.
    """
    empty = _SCHEMA.empty_table()
    names, centroids = _centroids(clusters)
    own_vectors = Workspace(config).corpus.require().details.get("dimensions") is not None
    if not names or own_vectors or config.embed.model in SURROGATES:
        return empty
    folder = resolve_model(config.embed.model, config.storage)
    encoder = load_encoder(folder, device=visible_device(config.embed.device), packed=True)
    if encoder.dimensions != centroids.shape[1]:
        return empty
    found = [empty]
    for collection in collections:
        texts = collection.read_queries(collection.read_judgements())
        tokens = encoder.prepare(
            list(texts.values()), config.evaluate.max_query_tokens, config.embed.query_prompt or ""
        )
        nearest = np.argmax(encoder.encode(tokens, config.embed.batch_tokens) @ centroids.T, axis=1)
        columns = [
            [collection.name] * len(texts),
            list(texts),
            [names[row][0] for row in nearest],
            [names[row][1] for row in nearest],
        ]
        found.append(pa.table(columns, schema=_SCHEMA))
    return pa.concat_tables(found)


def _centroids(clusters: Artifact) -> tuple[list[tuple[str, int]], np.ndarray]:
    """(source, number) of all centroids of the finest level, and their vectors (k, d) float32."""
    parts = [part for part in clusters.require().parts if part.details.get("content") == "centroids"]
    finest: dict[str, int] = {}
    for part in parts:
        source = part.details["group"]
        finest[source] = max(finest.get(source, 1), part.details.get("level", 1))
    names: list[tuple[str, int]] = []
    vectors = []
    counts: dict[str, int] = {}
    for part in parts:
        source = part.details["group"]
        if part.details.get("level", 1) < finest[source]:
            continue
        values = vector_values(read_parquet(clusters.folder, part.path, ["centroid"])["centroid"])
        first = counts.get(source, 0)
        names += [(source, first + row) for row in range(len(values))]
        counts[source] = first + len(values)
        vectors.append(values.astype(np.float32))
    return names, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)


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


def arm_rows(comparison: Comparison, language: Language) -> list[dict[str, Any]]:
    """One row per arm; None where a figure does not exist (the baseline's own difference, an interval of one seed or of
    a collection of one query)."""
    return [_row(comparison, arm, language) for arm in comparison.arms]


def steps_to_reach(comparison: Comparison, arm: ArmResult, value: float) -> float | None:
    """Steps after which an arm's mean curve first reaches `value`, on straight lines between its points."""
    curve = arm.curve.mean(1)
    for end in range(1, len(curve)):
        if curve[end] >= value:
            low, high = curve[end - 1], curve[end]
            share = 1.0 if high == low else float(np.clip((value - low) / (high - low), 0, 1))
            return float(comparison.steps[end - 1] + share * (comparison.steps[end] - comparison.steps[end - 1]))
    return None


def _row(comparison: Comparison, arm: ArmResult, language: Language) -> dict[str, Any]:
    several = arm.spread.seeds > 1
    seeds = np.mean(
        [comparison.scores[arm.name][name, comparison.metric].mean(1) for name in comparison.collections], 0
    )
    gain = arm.gain
    low, high = gain.interval(comparison.simultaneous) if gain and gain.is_known else (None, None)
    reach = steps_to_reach(comparison, arm, float(comparison.baseline.curve[-1].mean()))
    ahead = arm.curve.mean(1) - comparison.baseline.curve.mean(1)
    return {
        "arm": arm.name,
        "verdict": verdict_word(arm, language),
        "outcome": arm.verdict.outcome if arm.verdict else None,
        "value": arm.spread.mean,
        "spread": float(seeds.std(ddof=1)) if several else None,
        "difference": gain.mean if gain else None,
        "low": low,
        "high": high,
        "p_randomisation": arm.p_randomisation,
        "p_corrected": arm.p_corrected if arm.spread.is_known else None,
        # The first point of the curves, and the last two: whether an advantage grows or melts.
        "early": float(ahead[1]) if gain else None,
        "late": float(ahead[-2:].mean()) if gain else None,
        "trend": float(ahead[-2:].mean() - ahead[1]) if gain else None,
        "reach": reach,
        "reach_pairs": None if reach is None else round(reach * arm.batch),
        "reach_price": None if reach is None else _price_of_steps(arm, reach / float(comparison.steps[-1])),
        "per_point": _price_per_point(comparison, arm),
        "batch": arm.batch,
        "pairs": arm.pairs,
        "purity": arm.purity,
        "hardness": arm.hardness,
        "minutes": arm.cost.seconds / 60,
        "hours": arm.cost.hours,
        "device": arm.cost.device,
        "price": arm.cost.price,
        "traffic": arm.cost.traffic.model_dump(),
        "learning_rate": arm.setting["learning_rate"],
        "temperature": arm.setting["temperature"],
        "changes": dict(arm.changes),
    }


def _price_of_steps(arm: ArmResult, share: float) -> float:
    """Of the shared stages and a share of the training."""
    return arm.cost.price - (1 - share) * arm.cost.training_price


def _price_per_point(comparison: Comparison, arm: ArmResult) -> float | None:
    """What a hundredth of the metric costs beyond the baseline; None where there is no gain to pay for."""
    if arm.gain is None or arm.gain.mean <= 0:
        return None
    return (arm.cost.price - comparison.baseline.cost.price) / (100 * arm.gain.mean)
