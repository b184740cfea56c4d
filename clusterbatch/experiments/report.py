"""The report of a workspace: one self-contained HTML file and metrics.json, from manifests and training metrics."""

from __future__ import annotations

from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from clusterbatch.config import DOCSTRINGS, RunConfig
from clusterbatch.errors import DataError
from clusterbatch.evaluation.models import AFTER, BEFORE
from clusterbatch.experiments.gains import LEAST_QUERIES, query_gains
from clusterbatch.experiments.report_phrases import REPORT_PHRASES
from clusterbatch.experiments.summary import SUMMARY, finished_stages, workspace_summary
from clusterbatch.store.workspace import Workspace

REPORT = "index.html"
# Where a comparison's page lies, from the workspace's root.
COMPARED = "compare/report/index.html"


def write_report(config: RunConfig) -> str:
    """Writes `<workspace>/report/index.html` and `<workspace>/metrics.json`; returns the report's URI.

    Raises DataError where no stage has finished: there is nothing to report.
    """
    workspace = Workspace(config)
    summary = workspace_summary(config)
    if not summary["stages"]:
        raise DataError(f"{workspace.root.uri}: no finished stage here, nothing to report")
    workspace.root.write_json(SUMMARY, summary)
    software = finished_stages(config)[-1][2].software
    evaluated = {row["generation"] for row in summary["quality"]}
    intervals, segments = query_gains(config, max(evaluated)) if evaluated else ({}, [])
    page = (
        environment()
        .get_template("report.html.jinja")
        .render(
            language=config.report.language,
            words=REPORT_PHRASES[config.report.language],
            summary=summary,
            gains=gains(summary["quality"]),
            scoreboard=scoreboard(summary["quality"]),
            models=list(dict.fromkeys(row["model"] for row in summary["quality"])),
            intervals=intervals,
            last_generation=max(evaluated, default=0),
            segments=segments,
            least_queries=LEAST_QUERIES,
            incomplete=judged_by_pairs(config),
            compared=workspace.root.exists(COMPARED),
            configuration=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            software=software,
        )
    )
    workspace.report.write(REPORT, page.encode())
    return f"{workspace.report.uri}/{REPORT}"


def judged_by_pairs(config: RunConfig) -> bool:
    """Whether a test collection was made of pairs that were held out, the user's own or the sample's."""
    return not config.evaluate.path or DOCSTRINGS in config.evaluate.path


def gains(quality: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per generation, collection and metric: {generation, collection, metric, before, after, queries,
    documents}; in the order of the evaluation, the first metric of each collection leads."""
    return [
        {**row, BEFORE: row["values"][BEFORE], AFTER: row["values"][AFTER]}
        for row in scoreboard(quality)
        if {BEFORE, AFTER} <= row["values"].keys()
    ]


def scoreboard(quality: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per generation, collection and metric: {generation, collection, metric, values by model, queries,
    documents}, in the order of the evaluation."""
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    for entry in quality:
        key = (entry["generation"], entry["collection"], entry["metric"])
        names = ("generation", "collection", "metric", "queries", "documents")
        row = rows.setdefault(key, {**{name: entry[name] for name in names}, "values": {}})
        row["values"][entry["model"]] = entry["value"]
    return list(rows.values())


def environment() -> Environment:
    """Templates of this package. Every value is escaped: corpora hold any text, markup included."""
    loaded = Environment(
        loader=PackageLoader("clusterbatch.experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loaded.filters["count"] = lambda value: f"{value:,}"
    loaded.filters["megabytes"] = lambda value: f"{value / 2**20:,.1f}"
    return loaded
