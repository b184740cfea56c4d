"""The report of a comparison: a page that opens offline, a decision sheet, Markdown, and the figures as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clusterbatch.config import RunConfig, shown_configuration
from clusterbatch.experiments.compare import figures
from clusterbatch.experiments.compare.arms import arms_of, clustered_layout, with_phases
from clusterbatch.experiments.compare.breakdown import (
    arm_rows,
    clusters_of_queries,
    extremes,
    segment_rows,
    sources_of_queries,
)
from clusterbatch.experiments.compare.budget import decided
from clusterbatch.experiments.compare.hardness import with_groups
from clusterbatch.experiments.compare.results import Comparison, read_comparison
from clusterbatch.experiments.compare.stage import comparison_artifact, kept_layouts, with_sample
from clusterbatch.experiments.compare.trial import comparison_folder
from clusterbatch.experiments.compare.wording import (
    answer,
    larger_batches,
    meeting_sentences,
    next_step,
    same_batches,
    verdict_word,
)
from clusterbatch.experiments.compare.wording import figures as figures_in_words
from clusterbatch.pipeline.report import LEAST_QUERIES, held_out_by, judged_by_pairs
from clusterbatch.pipeline.summary import workspace_summary
from clusterbatch.reporting.cluster_views import (
    Example,
    MappedCluster,
    Outlier,
    ShardText,
    batch_example,
    cluster_map,
    cluster_rows,
    has_clusters,
    outliers,
)
from clusterbatch.reporting.figures import Plot, cluster_sizes
from clusterbatch.reporting.figures import cluster_map as cluster_map_figure
from clusterbatch.reporting.page import environment
from clusterbatch.reporting.phrases import comparison_phrases
from clusterbatch.store import Folder, Manifest
from clusterbatch.store.details import ComparisonDetails, details_of
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan

PAGE, DECISION, MARKDOWN, DATA = "index.html", "decision.html", "report.md", "comparison.json"


@dataclass(frozen=True)
class Views:
    """Batches and clusters of the report; nothing but examples if no arm has clusters."""

    examples: list[Example]
    mapped: list[MappedCluster] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    farthest: list[Outlier] = field(default_factory=list)


def write_comparison(config: RunConfig) -> str:
    """Write the folder `report` of the comparison and return the URI of its page.

    Raises DataError if nothing was compared.
    """
    artifact = comparison_artifact(config)
    manifest = artifact.require()
    config = with_sample(decided(config))
    comparison = read_comparison(config, artifact, manifest)
    folder = Workspace(config).root.child(*comparison_folder(config).split("/"), "report")
    words = comparison_phrases(config.report.language)
    views = _views(config, manifest)
    plots = [
        figures.difference_curves(comparison, config.compare.decide.min_gain, words),
        figures.learning_curves(comparison, words),
        figures.gains(comparison, config.compare.decide.min_gain, words),
        figures.gains_by_collection(comparison, words),
        figures.cost_against_gain(comparison, words),
    ]
    if views.sizes:
        plots.append(cluster_sizes(views.sizes, config.batches.size, words))
    if views.mapped:
        plots.append(cluster_map_figure(views.mapped, words))
    segments = {
        "segments": segment_rows(comparison, sources_of_queries(config, comparison)),
        "clusters": extremes(segment_rows(comparison, clusters_of_queries(comparison, artifact, manifest))),
    }
    context = {**_context(config, comparison, manifest, plots, views), **segments}
    templates = environment()
    for name, template in ((PAGE, "comparison"), (DECISION, "decision")):
        folder.write(name, templates.get_template(f"{template}.html.jinja").render(context).encode())
    folder.write(MARKDOWN, templates.get_template("comparison.md.jinja").render(context).encode())
    folder.write_json(
        DATA,
        {
            "answer": context["answer"],
            "arms": context["rows"],
            "segments": context["segments"],
            "clusters": context["clusters"],
        },
    )
    for plot in plots:
        for extension in ("png", "svg"):
            folder.write(f"figures/{plot.name}.{extension}", plot.file(extension))
    return f"{folder.uri}/{PAGE}"


def _context(
    config: RunConfig,
    comparison: Comparison,
    manifest: Manifest,
    plots: list[Plot],
    views: Views,
) -> dict[str, Any]:
    language = config.report.language
    rows = arm_rows(comparison, language)
    purities = {example.arm: example.purity for example in views.examples}
    # Without clusters there is no share of one.
    rows = [row if purities.get(row["arm"], 1) is not None else {**row, "purity": None} for row in rows]
    return {
        "language": language,
        "words": comparison_phrases(language),
        "comparison": comparison,
        "values": figures_in_words(comparison, config, language),
        "answer": answer(comparison, config, language),
        "next_step": next_step(comparison, config, language),
        "outcome": verdict_word(comparison.decisive, language),
        "sentences": meeting_sentences(comparison, config, language),
        "larger_batches": larger_batches(comparison, language),
        "same_batches": same_batches(comparison, language),
        "rows": rows,
        "priced": config.compare.prices.known,
        "on_gpus": any(arm.cost.gpu_hours for arm in comparison.arms),
        "incomplete": judged_by_pairs(config),
        "held_out_by": held_out_by(config),
        "plots": {plot.name: plot for plot in plots},
        "examples": views.examples,
        "mapped": views.mapped,
        "outliers": views.farthest,
        "texts": [f"{each.source} {each.cluster} ({each.rows:,}): {', '.join(each.terms)}" for each in views.mapped],
        "least_queries": LEAST_QUERIES,
        "summary": workspace_summary(config),
        "workspace": Folder(config.workspace).uri,
        "configuration": shown_configuration(config),
        "software": manifest.software,
    }


def _views(config: RunConfig, manifest: Manifest) -> Views:
    """Return examples of every arm's batches; map, sizes and outliers of the clusters that stand for all."""
    arms, layouts = arms_of(config)
    layouts = kept_layouts(config, layouts)
    details = details_of(manifest, ComparisonDetails)
    examples = []
    for each in arms:
        arm = with_groups(each, details["arms"][each.name]["clusters_per_batch"])
        arm = with_phases(arm, details["steps"])
        artifact = Workspace(layouts[arm.layout]).clusters()
        clusters = artifact.require()
        plan = open_plan(arm.config, artifact, clusters)
        text, clustered = ShardText(artifact, clusters), has_clusters(clusters)
        examples.append(batch_example(arm.name, plan, text, details["steps"], clustered=clustered))
    shown = clustered_layout(arms)
    if shown is None:
        return Views(examples)
    artifact = Workspace(layouts[shown]).clusters()
    clusters = artifact.require()
    return Views(
        examples,
        cluster_map(artifact, clusters, layouts[shown].cluster),
        cluster_rows(artifact, clusters),
        outliers(artifact, clusters),
    )
