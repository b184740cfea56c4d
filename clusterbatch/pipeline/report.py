"""Report of a workspace: one self-contained HTML file and metrics.json, from manifests and training metrics.

It shows what training changed, before against after, with intervals over queries, by collection and by segment; the
curves of training; and the clusters and batches that were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from scipy import stats

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.row_reader import StoredVectors
from clusterbatch.config import DOCSTRINGS, RunConfig, shown_configuration
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation.models import AFTER, BEFORE
from clusterbatch.evaluation.results import read_scores
from clusterbatch.pipeline import run_figures
from clusterbatch.pipeline.summary import (
    SUMMARY,
    finished_stages,
    gains,
    generations,
    scoreboard,
    workspace_summary,
)
from clusterbatch.reporting.cluster_views import (
    Example,
    MappedCluster,
    ShardText,
    batch_example,
    cluster_map,
    cluster_rows,
    has_clusters,
    near_pairs,
)
from clusterbatch.reporting.figures import Plot, cluster_sizes
from clusterbatch.reporting.figures import cluster_map as cluster_map_figure
from clusterbatch.reporting.page import environment
from clusterbatch.reporting.phrases import workspace_phrases
from clusterbatch.shards.index import LeftOut
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.details import ClustersDetails, EvaluationDetails, SemanticDuplicates, TrainDetails, details_of
from clusterbatch.store.workspace import Workspace

_CONFIDENCE = 0.95
# Segments with fewer queries say too little.
LEAST_QUERIES = 20


def segments_of(queries: Iterable[str], pattern: str) -> np.ndarray:
    """Return (Q,) names by report.segment_pattern, '' if an id names none."""
    compiled = re.compile(pattern)
    matches = (compiled.match(query) for query in queries)
    return np.array([(match[1] or "") if match else "" for match in matches])


def paired_interval(
    after: np.ndarray, before: np.ndarray, confidence: float = _CONFIDENCE
) -> tuple[float, float] | None:
    """Return the interval of the mean difference for other queries of the same kind (paired t, scipy) from (Q,) scores.

    None for a single query, which says nothing about others, and for differences that are all equal, which are no
    measure of chance. Another seed of the training is another matter: `compare` measures that.
    """
    if len(after) < 2 or np.ptp(after - before) < 1e-12:
        return None
    low, high = stats.ttest_rel(after, before).confidence_interval(confidence)
    return float(low), float(high)


def query_gains(
    config: RunConfig, generation: int
) -> tuple[dict[tuple[str, str], tuple[float, float] | None], list[dict[str, Any]]]:
    """Return intervals by (collection, metric), and, for the first metric, one row per segment.

    Rows are {collection, metric, segment, queries, before, after, gain, low, high}, best first; low and high are None
    if there is no interval. The intervals of the segments hold together (Bonferroni): the best and the worst are looked
    at first. Both are empty if the evaluation lacks before or after.
    """
    artifact = Workspace(config).evaluation(generation)
    manifest = artifact.require()
    details = details_of(manifest, EvaluationDetails)
    if not {BEFORE, AFTER} <= set(details["models"]):
        return {}, []
    table = read_scores(artifact, manifest)
    keys = list(dict.fromkeys((row["collection"], row["metric"]) for row in details["table"]))
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
                scores = own[chosen], reference[chosen]
                segments.append({"collection": collection, "metric": metric, "segment": name, "scores": scores})
    return intervals, sorted((_segment_row(row, len(segments)) for row in segments), key=lambda row: -row["gain"])


def _segment_row(segment: dict[str, Any], segments: int) -> dict[str, Any]:
    own, reference = segment.pop("scores")
    interval = paired_interval(own, reference, 1 - (1 - _CONFIDENCE) / segments)
    low, high = interval if interval else (None, None)
    before, after = float(np.mean(reference)), float(np.mean(own))
    return {
        **segment,
        "queries": len(own),
        "before": before,
        "after": after,
        "gain": float(np.mean(own - reference)),
        "low": low,
        "high": high,
    }


REPORT = "index.html"
# Where a comparison's page lies, from the workspace's root.
COMPARED = "compare/report/index.html"


@dataclass(frozen=True)
class Views:
    """Figures and examples of one generation's training, clusters and batches; empty if a stage has not finished."""

    plots: list[Plot] = field(default_factory=list)
    mapped: list[MappedCluster] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    # Counts by source of semantic duplicates, some pairs of them, and what thresholds leave out.
    duplicates: dict[str, SemanticDuplicates] = field(default_factory=dict)
    near_pairs: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)


def write_report(config: RunConfig) -> str:
    """Write `<workspace>/report/index.html` and `<workspace>/metrics.json`; return the report's URI.

    Raises DataError if no stage has finished: there is nothing to report.
    """
    workspace = Workspace(config)
    summary = workspace_summary(config)
    if not summary["stages"]:
        raise DataError(f"{workspace.root.uri}: no finished stage here, nothing to report")
    workspace.root.write_json(SUMMARY, summary)
    software = finished_stages(config)[-1][2].software
    evaluated = {row["generation"] for row in summary["quality"]}
    intervals, segments = query_gains(config, max(evaluated)) if evaluated else ({}, [])
    words = workspace_phrases(config.report.language)
    views = run_views(config, words)
    plots = list(views.plots)
    if segments and all(row["low"] is not None for row in segments):
        plots.append(run_figures.segments_before_after(segments, segments[0]["metric"], words))
    if any(row["own_value"] is not None for row in summary["refresh"]):
        plots.append(run_figures.refresh_rounds(summary["refresh"], summary["live_generation"], words))
    page = (
        environment()
        .get_template("report.html.jinja")
        .render(
            language=config.report.language,
            words=words,
            summary=summary,
            headlines=headlines(summary["quality"], summary["live_generation"]),
            plots={plot.name: plot for plot in plots},
            mapped=views.mapped,
            examples=views.examples,
            duplicates=views.duplicates,
            near_pairs=views.near_pairs,
            left_out=views.left_out,
            texts=[f"{each.source} {each.cluster}: {', '.join(each.terms)}" for each in views.mapped],
            scoreboard=scoreboard(summary["quality"]),
            models=list(dict.fromkeys(row["model"] for row in summary["quality"])),
            intervals=intervals,
            last_generation=max(evaluated, default=0),
            dtypes=_dtypes(workspace, max(evaluated)) if evaluated else [],
            segments=segments,
            least_queries=LEAST_QUERIES,
            incomplete=judged_by_pairs(config),
            held_out_by=held_out_by(config),
            compared=workspace.root.exists(COMPARED),
            configuration=shown_configuration(config),
            software=software,
        )
    )
    workspace.report.write(REPORT, page.encode())
    return f"{workspace.report.uri}/{REPORT}"


def _dtypes(workspace: Workspace, generation: int) -> list[str]:
    """Return the number types that a generation's models were measured in; older evaluations do not say."""
    return details_of(workspace.evaluation(generation).require(), EvaluationDetails).get("dtypes", [])


def run_views(config: RunConfig, words: Mapping[str, str]) -> Views:
    """Return what is shown of the last generation that has clusters or a finished training."""
    workspace = Workspace(config)
    views = Views()
    for generation in reversed(generations(config)):
        training, trained = workspace.train(generation), workspace.train(generation).manifest()
        if trained is not None:
            views.left_out.update(details_of(trained, TrainDetails)["plan"].get("filtered", {}))
            lines = run_figures.training_lines(training, trained)
            # Of two points there is no curve.
            if len(lines) > 2:
                views.plots.extend(run_figures.training_curves(lines, words))
        clusters, clustered = workspace.clusters(generation), workspace.clusters(generation).manifest()
        if clustered is not None:
            _add_clusters(views, config, clusters, clustered, words)
        if views.plots or views.examples:
            break
    return views


def _add_clusters(
    views: Views, config: RunConfig, clusters: Artifact, manifest: Manifest, words: Mapping[str, str]
) -> None:
    grouping = manifest.config["stratify"]
    if grouping == "cluster":
        views.plots.append(cluster_sizes(cluster_rows(clusters, manifest), config.batches.size, words))
        views.mapped.extend(cluster_map(clusters, manifest, config.cluster))
        if views.mapped:
            views.plots.append(cluster_map_figure(views.mapped, words))
    views.duplicates.update(details_of(manifest, ClustersDetails).get("duplicates", {}))
    views.near_pairs.extend(near_pairs(clusters, manifest))
    text, reader, clustered = ShardText(clusters, manifest), ShardReader(clusters), has_clusters(manifest)
    # It lasts longest.
    last = config.batches.phases[-1]
    for stratify in dict.fromkeys(("random", last.stratify)):
        batches = last.model_copy(update={"stratify": stratify, "source_weights": None})
        if stratify != last.stratify:
            batches = batches.model_copy(update={"super_batch": 1})
        try:
            vectors = StoredVectors(reader, reader.index)
            plan = make_plan(reader.index, batches, grouping, vectors)
        # Too few rows for a batch, or shards that cannot serve the strategy: there is nothing to show.
        except UsageError:
            continue
        name = stratify if batches.super_batch == 1 else f"{stratify}, super_batch {batches.super_batch}"
        views.examples.append(batch_example(name, plan, text, plan.steps_per_epoch, clustered=clustered))


def headlines(quality: list[dict[str, Any]], live: int | None) -> list[dict[str, Any]]:
    """Return the rows of `gains` that lead the report: the first metric of each collection, for the live generation.

    Each also has `reference`: {model, value} of the best other model that beats the trained one, or None.
    """
    rows = gains(quality)
    shown = live if any(row["generation"] == live for row in rows) else max((r["generation"] for r in rows), default=0)
    leading = [row for row in rows if row["metric"] == rows[0]["metric"] and row["generation"] == shown]
    found = []
    for row in leading:
        others = {model: value for model, value in row["values"].items() if model not in (BEFORE, AFTER)}
        best = max(others, key=lambda model: others[model], default=None)
        beaten = best is not None and others[best] > row[AFTER]
        found.append({**row, "reference": {"model": best, "value": others[best]} if best and beaten else None})
    return found


def judged_by_pairs(config: RunConfig) -> bool:
    """Return whether a test collection was made of held-out pairs, the user's own or the sample's."""
    return not config.evaluate.path or DOCSTRINGS in config.evaluate.path


def held_out_by(config: RunConfig) -> str | None:
    """Return how the corpus' own collection was held out, `document` or `query`; None if another one is measured on."""
    return None if config.evaluate.path else config.evaluate.holdout_by
