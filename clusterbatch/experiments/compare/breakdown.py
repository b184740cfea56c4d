"""Rows of a comparison's tables: arms, and gains of the decisive arm by source and by cluster.

A query's source is named by its id; its cluster is the nearest one. How figures are written is up to the templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.config.experiments import Language
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.embedder import embedding_prompts
from clusterbatch.encoder.devices import visible_device
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation.collection import Collection
from clusterbatch.experiments.compare.results import ArmResult, Comparison
from clusterbatch.experiments.compare.statistics import Spread, difference
from clusterbatch.experiments.compare.wording import verdict_word
from clusterbatch.pipeline.report import LEAST_QUERIES, segments_of
from clusterbatch.shards.cluster_means import as_stored, cluster_means
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.details import given_dimensions
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

# Clusters shown at each end of the list.
_EXTREMES = 10
# Name of the part of a comparison with the nearest cluster of each query.
SEGMENTS = "segments"
_SCHEMA = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        # Number of the cluster inside the source, as in the cluster index.
        pa.field("cluster", pa.int32(), nullable=False),
    ]
)


def query_segments(config: RunConfig, clusters: Artifact, collections: Sequence[Collection]) -> pa.Table:
    """Return the cluster, of any source, that the surrogate's vector of every judged query is nearest to.

    Columns collection, query_id, source, cluster (numbers of the index). No rows if queries have no vectors comparable
    with those of the clusters: the user's own vectors, character n-grams, shards without vectors.
    """
    empty = _SCHEMA.empty_table()
    own_vectors = given_dimensions(Workspace(config).corpus.require()) is not None
    if own_vectors or config.embed.model in SURROGATES:
        return empty
    means = cluster_means(clusters, config.cluster)
    if means is None:
        return empty
    folder = resolve_model(config.embed.model, config.storage)
    encoder = load_encoder(folder, device=visible_device(config.embed.device), packed=True)
    prompt = embedding_prompts(config.embed, encoder.prompts)["query"]
    found = [empty]
    for collection in collections:
        texts = collection.read_queries(collection.read_judgements())
        tokens = encoder.prepare(list(texts.values()), config.evaluate.max_query_tokens, prompt)
        vectors = encoder.encode(tokens, config.embed.batch_tokens)
        nearest = means.nearest(as_stored(vectors, clusters, config.cluster)).tolist()
        columns = [
            [collection.name] * len(texts),
            list(texts),
            [means.names[row][0] for row in nearest],
            [means.names[row][1] for row in nearest],
        ]
        found.append(pa.table(columns, schema=_SCHEMA))
    return pa.concat_tables(found)


def sources_of_queries(config: RunConfig, comparison: Comparison) -> dict[str, np.ndarray]:
    """Return the source that each query's id names, '' if none, (Q,) by collection."""
    pattern = config.report.segment_pattern
    return {name: segments_of(comparison.queries[name], pattern) for name in comparison.collections}


def clusters_of_queries(comparison: Comparison, artifact: Artifact, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the cluster that each query is nearest to, (Q,) by collection; empty if that is not known.

    Comparisons of earlier versions hold numbers of centroids, which are not those of the clusters: they do not count.
    """
    part = next((part for part in manifest.parts if part.details.get("content") == SEGMENTS), None)
    if part is None:
        return {}
    table = read_parquet(artifact.folder, part)
    if "cluster" not in table.column_names:
        return {}
    columns = (table[name].to_pylist() for name in ("collection", "query_id", "source", "cluster"))
    cluster = {(name, query): f"{source} {number}" for name, query, source, number in zip(*columns, strict=True)}
    return {
        name: np.array([cluster.get((name, query), "") for query in comparison.queries[name]])
        for name in comparison.collections
    }


def segment_rows(comparison: Comparison, segments: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the gain of the decisive arm by collection and segment, the best first.

    {collection, segment, queries, gain, low, high}; low and high are None with one seed. Intervals hold for all rows
    together, so that they also hold for those that are picked as the best and the worst. Queries of the segment '' and
    segments of few queries are left out.
    """
    arm, metric = comparison.decisive.name, comparison.metric
    found: list[tuple[dict[str, Any], Spread]] = []
    for collection, of_query in segments.items():
        own, reference = (comparison.scores[name][collection, metric] for name in (arm, comparison.reference))
        for segment in sorted(set(of_query.tolist()) - {""}):
            chosen = of_query == segment
            if chosen.sum() < LEAST_QUERIES:
                continue
            entry = {"collection": collection, "segment": segment, "queries": int(chosen.sum())}
            found.append((entry, difference([own[:, chosen]], [reference[:, chosen]])))
    rows = []
    for entry, spread in found:
        low, high = spread.interval(comparison.joint(len(found))) if spread.is_known else (None, None)
        rows.append({**entry, "gain": spread.mean, "low": low, "high": high})
    return sorted(rows, key=lambda row: -row["gain"])


def extremes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the clusters that gain and lose most."""
    return rows if len(rows) <= 2 * _EXTREMES else [*rows[:_EXTREMES], *rows[-_EXTREMES:]]


def arm_rows(comparison: Comparison, language: Language) -> list[dict[str, Any]]:
    """Return one row per arm.

    None if a figure does not exist, for example the baseline's own difference or an interval of one seed.
    """
    return [_row(comparison, arm, language) for arm in comparison.arms]


def steps_to_reach(comparison: Comparison, arm: ArmResult, value: float) -> float | None:
    """Return the steps after which an arm's mean curve first reaches `value`, on straight lines between its points."""
    curve = arm.curve.mean(1)
    if curve[0] >= value:
        # The untrained model has it.
        return 0.0
    for end in range(1, len(curve)):
        if curve[end] >= value:
            low, high = curve[end - 1], curve[end]
            share = float((value - low) / (high - low))
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
    # Without the untrained model, in which no arm is ahead.
    ahead = (arm.curve.mean(1) - comparison.baseline.curve.mean(1))[1:]
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
        "p_corrected": arm.p_corrected if gain and gain.is_known else None,
        # The first point of the curves, and the last two: whether an advantage grows or melts.
        "early": float(ahead[0]) if gain else None,
        "late": float(ahead[-2:].mean()) if gain else None,
        # A single point shows none.
        "trend": float(ahead[-2:].mean() - ahead[0]) if gain and len(ahead) > 1 else None,
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
        "gpu_hours": arm.cost.gpu_hours,
        "device": arm.cost.device,
        "price": arm.cost.price,
        "traffic": arm.cost.traffic.model_dump(),
        "learning_rate": arm.setting["learning_rate"],
        "temperature": arm.setting["temperature"],
        "changes": dict(arm.changes),
    }


def _price_of_steps(arm: ArmResult, share: float) -> float | None:
    """Return the price of the shared stages and of a share of the training; None without prices."""
    if arm.cost.price is None or arm.cost.training_price is None:
        return None
    return arm.cost.price - (1 - share) * arm.cost.training_price


def _price_per_point(comparison: Comparison, arm: ArmResult) -> float | None:
    """Return the price of a hundredth of the metric beyond the baseline; None without prices or without a gain."""
    own, reference = arm.cost.price, comparison.baseline.cost.price
    if arm.gain is None or arm.gain.mean <= 0 or own is None or reference is None:
        return None
    return (own - reference) / (100 * arm.gain.mean)
