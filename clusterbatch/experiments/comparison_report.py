"""The report of a comparison: a page that opens offline, a decision sheet, Markdown, and the figures as files."""

from __future__ import annotations

from typing import Any

import yaml

from clusterbatch.config import RunConfig
from clusterbatch.experiments import figures
from clusterbatch.experiments.arms import arms_of
from clusterbatch.experiments.clusterviews import (
    Example,
    MappedCluster,
    ShardText,
    batch_example,
    cluster_map,
    cluster_rows,
)
from clusterbatch.experiments.compare import comparison_artifact, prepared, with_sample
from clusterbatch.experiments.comparison import Comparison, read_comparison
from clusterbatch.experiments.figures import Plot
from clusterbatch.experiments.gains import LEAST_QUERIES, segments_of
from clusterbatch.experiments.phrases import PHRASES
from clusterbatch.experiments.report import environment
from clusterbatch.experiments.statistics import difference
from clusterbatch.experiments.summary import workspace_summary
from clusterbatch.experiments.tables import arm_rows
from clusterbatch.experiments.wording import answer, decisive, meeting_sentences, next_step, verdict_word
from clusterbatch.experiments.wording import figures as figures_in_words
from clusterbatch.store import Folder, Manifest
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan

PAGE, DECISION, MARKDOWN, DATA = "index.html", "decision.html", "report.md", "comparison.json"


def write_comparison(config: RunConfig) -> str:
    """Writes <workspace>/compare/report/; returns the URI of its page. Raises DataError where nothing was compared."""
    artifact = comparison_artifact(config)
    manifest = artifact.require()
    config = with_sample(prepared(config))
    comparison = read_comparison(config, artifact, manifest)
    folder = Workspace(config).root.child("compare", "report")
    words = PHRASES[config.report.language]
    examples, mapped, sizes = _views(config, comparison)
    plots = [
        figures.learning_curves(comparison, words),
        figures.gains(comparison, config.compare.decide.min_gain, words),
        figures.gains_by_collection(comparison, words),
        figures.cost_against_gain(comparison, words),
    ]
    if sizes:
        plots.append(figures.cluster_sizes(sizes, config.batches.size, words))
    if mapped:
        plots.append(figures.cluster_map(mapped, words))
    context = _context(config, comparison, manifest, plots, examples, mapped)
    templates = environment()
    for name, template in ((PAGE, "comparison"), (DECISION, "decision")):
        folder.write(name, templates.get_template(f"{template}.html.jinja").render(context).encode())
    folder.write(MARKDOWN, templates.get_template("comparison.md.jinja").render(context).encode())
    folder.write_json(DATA, {"answer": context["answer"], "arms": context["rows"], "segments": context["segments"]})
    for plot in plots:
        for extension in ("png", "svg"):
            folder.write(f"figures/{plot.name}.{extension}", plot.file(extension))
    return f"{folder.uri}/{PAGE}"


def _context(
    config: RunConfig,
    comparison: Comparison,
    manifest: Manifest,
    plots: list[Plot],
    examples: list[Example],
    mapped: list[MappedCluster],
) -> dict[str, Any]:
    language = config.report.language
    return {
        "language": language,
        "words": PHRASES[language],
        "comparison": comparison,
        "values": figures_in_words(comparison, config),
        "answer": answer(comparison, config, language),
        "next_step": next_step(comparison, config, language),
        "outcome": verdict_word(decisive(comparison), language),
        "sentences": meeting_sentences(comparison, config, language),
        "rows": arm_rows(comparison, language),
        "plots": {plot.name: plot for plot in plots},
        "examples": examples,
        "mapped": mapped,
        "texts": [f"{each.source} {each.cluster} ({each.rows:,}): {', '.join(each.terms)}" for each in mapped],
        "segments": segment_rows(config, comparison),
        "least_queries": LEAST_QUERIES,
        "summary": workspace_summary(config),
        "workspace": Folder(config.workspace).uri,
        "configuration": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "software": manifest.software,
    }


def segment_rows(config: RunConfig, comparison: Comparison) -> list[dict[str, Any]]:
    """Gain of the decisive arm by collection and segment, the best first: {collection, segment, queries, gain, low,
    high}; empty where ids name no segments."""
    arm, metric = decisive(comparison).name, comparison.metric
    rows = []
    for collection in comparison.collections:
        segments = segments_of(comparison.queries[collection], config.report.segment_pattern)
        own, reference = (comparison.scores[name][collection, metric] for name in (arm, comparison.reference))
        for segment in sorted(set(segments.tolist()) - {""}):
            chosen = segments == segment
            if chosen.sum() < LEAST_QUERIES:
                continue
            spread = difference([own[:, chosen]], [reference[:, chosen]])
            low, high = spread.interval(comparison.confidence)
            entry = {"collection": collection, "segment": segment, "queries": int(chosen.sum())}
            rows.append({**entry, "gain": spread.mean, "low": low, "high": high})
    return sorted(rows, key=lambda row: -row["gain"])


def _views(config: RunConfig, comparison: Comparison) -> tuple[list[Example], list[MappedCluster], list[int]]:
    """Examples of every arm's batches, the map and the cluster sizes of the first layout that has clusters."""
    arms, layouts = arms_of(config)
    examples = []
    for arm in arms:
        artifact = Workspace(layouts[arm.layout]).clusters()
        manifest = artifact.require()
        plan = open_plan(arm.config, artifact, manifest)
        examples.append(batch_example(arm.name, plan, ShardText(artifact, manifest)))
    split = next((layouts[arm.layout] for arm in arms if arm.uses_clusters), None)
    if split is None:
        return examples, [], []
    artifact = Workspace(split).clusters()
    manifest = artifact.require()
    return examples, cluster_map(artifact, manifest), cluster_rows(artifact, manifest)
