"""What came out of earlier comparisons, source by source, and what that foretells of a new corpus.

The table is a JSON file at `predict.experience`: `compare` adds a row for every source that enough of its test queries
are nearest to, with what `predict` measures of the source and what every arm gained there. `predict` learns from the
rows of other corpora, and says how far it would have missed each of them, left out: only where that is clearly less
than guessing their mean is the table worth anything.

Legend: N rows of the table, F features, A arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.experiments.compare.breakdown import clusters_of_queries
from clusterbatch.experiments.compare.results import Comparison, read_comparison
from clusterbatch.experiments.compare.statistics import difference
from clusterbatch.pipeline.report import LEAST_QUERIES
from clusterbatch.store import Artifact, Folder, Manifest
from clusterbatch.store.workspace import Workspace

FEATURES = ("gain", "diversity", "hardness", "false negatives", "duplicates", "log rows")
# Fewer rows teach nothing.
_LEAST_ROWS = 8


def features_of(source: Mapping[str, Any]) -> list[float]:
    """FEATURES of one source of a prediction: the predicted gain and what else is known before training."""
    own = source["source"]
    return [
        source["gain"],
        source["diversity"],
        own["hardness"],
        own["false_negatives"],
        source["duplicates"],
        float(np.log(source["rows"])),
    ]


def remember(config: RunConfig, artifact: Artifact, manifest: Manifest, predicted: Mapping[str, Any]) -> int:
    """Adds a finished comparison's outcomes to the table, in place of those it had of the same one; returns how many.

    predicted: `sources` of the prediction for its corpus.
    """
    comparison = read_comparison(config, artifact, manifest)
    gains = source_gains(comparison, sources_of_queries(comparison, artifact, manifest))
    corpus = Workspace(config).corpus.require().fingerprint
    rows = [
        {
            "comparison": manifest.fingerprint,
            "corpus": corpus,
            "workspace": config.workspace,
            "source": name,
            "metric": comparison.metric,
            "baseline": comparison.reference,
            "features": dict(zip(FEATURES, features_of(predicted[name]), strict=True)),
            **outcome,
        }
        for name, outcome in gains.items()
        if name in predicted
    ]
    folder, name = _place(config)
    kept = [row for row in read_table(config) if row["comparison"] != manifest.fingerprint]
    folder.write_json(name, [*kept, *rows])
    return len(rows)


def read_table(config: RunConfig) -> list[dict[str, Any]]:
    """All rows; none where there is no table yet. Raises DataError where it is something else."""
    folder, name = _place(config)
    try:
        rows = folder.read_json(name)
    except FileNotFoundError:
        return []
    except ValueError:
        raise DataError(f"predict.experience: {folder.uri}/{name} is not JSON") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "gains" in row for row in rows):
        raise DataError(f"predict.experience: {folder.uri}/{name} is no table of outcomes")
    return rows


def sources_of_queries(comparison: Comparison, artifact: Artifact, manifest: Manifest) -> dict[str, np.ndarray]:
    """(Q,) the source whose cluster each query is nearest to, by collection; empty where that was not found out."""
    clusters = clusters_of_queries(comparison, artifact, manifest)
    return {
        name: np.array([cluster.rpartition(" ")[0] for cluster in of_query.tolist()])
        for name, of_query in clusters.items()
    }


def source_gains(comparison: Comparison, sources: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """By source with enough queries, of all collections: {queries, gains and errors (standard) by arm}."""
    if not sources:
        return {}
    nearest = np.concatenate([sources[name] for name in comparison.collections])
    scores = {
        arm.name: np.concatenate(
            [comparison.scores[arm.name][name, comparison.metric] for name in comparison.collections], axis=1
        )
        for arm in comparison.arms
    }
    found = {}
    for source in sorted(set(nearest.tolist()) - {""}):
        chosen = nearest == source
        if chosen.sum() < LEAST_QUERIES:
            continue
        spreads = {
            arm.name: difference([scores[arm.name][:, chosen]], [scores[comparison.reference][:, chosen]])
            for arm in comparison.others
        }
        found[source] = {
            "queries": int(chosen.sum()),
            "gains": {arm: spread.mean for arm, spread in spreads.items()},
            # Over queries alone where there was one seed.
            "errors": {
                arm: float(np.sqrt(np.nansum([each.variance_queries, each.variance_seeds])))
                for arm, each in spreads.items()
            },
        }
    return found


def foretell(config: RunConfig, corpus: str, predicted: Mapping[str, Any]) -> dict[str, Any]:
    """What the rows of other corpora than `corpus` (a fingerprint) say of the sources of a prediction.

    {rows; baseline, metric; arms: by name {error, guessing: mean absolute errors of rows left out, and of guessing the
    others' mean}; sources: by name {gains by arm, nearest: {source, workspace, gains}}}; arms and sources are empty
    where the table is too small.
    """
    metric = parse_metric(config.compare.decide.metric).name
    rows = [
        row
        for row in read_table(config)
        if row["corpus"] != corpus and (row["baseline"], row["metric"]) == (config.compare.reference, metric)
    ]
    found: dict[str, Any] = {"rows": len(rows), "baseline": config.compare.reference, "metric": metric}
    arms = sorted(set.intersection(*(set(row["gains"]) for row in rows))) if rows else []
    if len(rows) < _LEAST_ROWS or not arms:
        return {**found, "arms": {}, "sources": {}}
    features = np.array([[row["features"][name] for name in FEATURES] for row in rows])
    gains = np.array([[row["gains"][arm] for arm in arms] for row in rows])
    errors = np.abs(left_out(features, gains) - gains).mean(axis=0)
    others = (gains.sum(axis=0) - gains) / (len(rows) - 1)
    guessing = np.abs(others - gains).mean(axis=0)
    asked = np.array([features_of(source) for source in predicted.values()])
    estimates = regression(len(rows)).fit(features, gains).predict(asked).reshape(len(asked), -1)
    nearest = nearest_rows(features, asked)
    return {
        **found,
        "arms": {
            arm: {"error": float(errors[place]), "guessing": float(guessing[place])} for place, arm in enumerate(arms)
        },
        "sources": {
            name: {
                "gains": dict(zip(arms, estimate.tolist(), strict=True)),
                "nearest": {key: rows[row][key] for key in ("source", "workspace", "gains")},
            }
            for name, estimate, row in zip(predicted, estimates, nearest, strict=True)
        },
    }


def regression(rows: int) -> Pipeline:
    """Ridge over standardised features. The penalty is as heavy as if each feature had been seen to do nothing as often
    as it was seen at all: with few rows it must be."""
    return make_pipeline(StandardScaler(), Ridge(alpha=rows))


def left_out(features: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """(N, A): for each row what is learned from the others says of it; features: (N, F), outcomes: (N, A)."""
    predicted = cross_val_predict(regression(len(features) - 1), features, outcomes, cv=LeaveOneOut())
    return np.asarray(predicted).reshape(outcomes.shape)


def nearest_rows(features: np.ndarray, asked: np.ndarray) -> list[int]:
    """The row of the table (N, F) that is most like each of those asked for, in standardised features."""
    scale = StandardScaler().fit(features)
    neighbours = NearestNeighbors(n_neighbors=1).fit(scale.transform(features))
    found: list[int] = neighbours.kneighbors(scale.transform(asked), return_distance=False)[:, 0].tolist()
    return found


def _place(config: RunConfig) -> tuple[Folder, str]:
    assert config.predict.experience is not None
    folder, _, name = config.predict.experience.rpartition("/")
    return Folder(folder, config.storage), name
