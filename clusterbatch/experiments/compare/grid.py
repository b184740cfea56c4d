"""Comparisons at several batch sizes: gain over the baseline by batch size and cluster size, as JSON and a page.

Each size is a comparison of its own, with its own report; corpus, embeddings and clusters of equal size are shared.
"""

from __future__ import annotations

from typing import Any

from clusterbatch.clustering.cells import mean_size
from clusterbatch.config import RunConfig, shown_configuration
from clusterbatch.errors import UsageError
from clusterbatch.experiments.compare import figures
from clusterbatch.experiments.compare.arms import arms_of
from clusterbatch.experiments.compare.plan import at_size
from clusterbatch.experiments.compare.results import ArmResult, Comparison, read_comparison
from clusterbatch.experiments.compare.stage import compare, comparison_artifact, with_sample
from clusterbatch.log import say
from clusterbatch.pipeline.report import held_out_by
from clusterbatch.reporting.page import environment
from clusterbatch.reporting.phrases import comparison_phrases
from clusterbatch.runtime import lasting_session
from clusterbatch.store import Folder
from clusterbatch.store.details import CorpusDetails, details_of
from clusterbatch.store.workspace import Workspace

PAGE, CELLS = "index.html", "cells.json"


def compare_sizes(config: RunConfig, *, force: bool = False) -> str:
    """Compare the arms at every size of `compare.batch_sizes`, in their order; return the URI of the page.

    Cells and page are written after every size, so that an interrupted run shows what it has. Raises UsageError if the
    training has a fixed number of steps.
    """
    if config.train.steps is not None:
        raise UsageError(
            "compare.batch_sizes: every size trains for the same epochs; give train.epochs, not train.steps"
        )
    page = ""
    with lasting_session():
        for size in config.compare.batch_sizes:
            say(f"compare: batches of {size}")
            compare(at_size(config, size), force=force)
            page = write_grid(config)
    return page


def finished_sizes(config: RunConfig) -> list[int]:
    """Return the batch sizes, ascending, whose comparisons are finished."""
    sizes = sorted(config.compare.batch_sizes)
    return [size for size in sizes if comparison_artifact(at_size(config, size)).manifest() is not None]


def write_grid(config: RunConfig) -> str:
    """Write <workspace>/compare/report/ from the finished sizes, at least one; return the URI of its page.

    cells.json: metric, baseline, held_out_by, sources (rows by name), queries (ids by collection), and cells: one of
    each size and arm, with mean, gain over the baseline of the same size, its interval (for all arms of a size
    together), and the scores, a list of queries for each seed, by collection.
    """
    found = {size: _read(at_size(config, size)) for size in finished_sizes(config)}
    first = next(iter(found.values()))
    corpus = Workspace(with_sample(config)).corpus.require()
    cells = [
        _cell(at_size(config, size), comparison, arm) for size, comparison in found.items() for arm in comparison.arms
    ]
    language = config.report.language
    words = comparison_phrases(language)
    plots = [figures.gain_by_batch(cells, first.metric, first.reference, words)]
    if len({cell["cluster_batches"] for cell in cells} - {None}) > 1:
        plots.append(figures.gain_map(cells, first.metric, first.reference, words))
    folder = Workspace(config).root.child("compare", "report")
    folder.write_json(
        CELLS,
        {
            "metric": first.metric,
            "baseline": first.reference,
            "held_out_by": held_out_by(config),
            "sources": details_of(corpus, CorpusDetails)["sources"],
            "queries": first.queries,
            "cells": cells,
        },
    )
    context = {
        "language": language,
        "words": words,
        "workspace": Folder(config.workspace).uri,
        "metric": first.metric,
        "baseline": first.reference,
        "held_out_by": held_out_by(config),
        "cells": cells,
        "sizes": list(found),
        "plots": plots,
        "configuration": shown_configuration(config),
    }
    folder.write(PAGE, environment().get_template("grid.html.jinja").render(context).encode())
    for plot in plots:
        for extension in ("png", "svg"):
            folder.write(f"figures/{plot.name}.{extension}", plot.file(extension))
    return f"{folder.uri}/{PAGE}"


def _read(config: RunConfig) -> Comparison:
    artifact = comparison_artifact(config)
    return read_comparison(with_sample(config), artifact, artifact.require())


def _cell(config: RunConfig, comparison: Comparison, arm: ArmResult) -> dict[str, Any]:
    """Return the entry of cells.json for one arm of the comparison at `config.batches.size`."""
    known = arm.gain is not None and arm.gain.is_known
    low, high = arm.gain.interval(comparison.simultaneous) if arm.gain and known else (None, None)
    made = next(each.config for each in arms_of(config)[0] if each.name == arm.name)
    return {
        "batch": arm.batch,
        "arm": arm.name,
        "stratify": arm.stratify,
        "cluster_batches": mean_size(made) / arm.batch if arm.stratify == "cluster" else None,
        "steps": int(comparison.steps[-1]),
        "hardness": arm.hardness,
        "purity": arm.purity,
        "seconds": arm.cost.seconds,
        **arm.setting,
        "value": arm.spread.mean,
        "gain": arm.gain.mean if arm.gain else None,
        "error": arm.gain.error if arm.gain and known else None,
        "low": low,
        "high": high,
        "scores": {
            name: comparison.scores[arm.name][name, comparison.metric].round(5).tolist()
            for name in comparison.collections
        },
    }
