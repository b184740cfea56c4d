"""One summary of a workspace: row counts, quality and cost of every stage, read from manifests alone."""

from __future__ import annotations

from typing import Any

from clusterbatch.config import RunConfig
from clusterbatch.pipeline.rounds import rounds
from clusterbatch.store import Manifest
from clusterbatch.store.details import EvaluationDetails, details_of
from clusterbatch.store.workspace import STAGE_ARTIFACTS, Workspace, live_generation

SUMMARY = "metrics.json"
# Labels of the untrained and the trained model in an evaluation.
_BEFORE, _AFTER = "before", "after"


def workspace_summary(config: RunConfig) -> dict[str, Any]:
    """Return the content of metrics.json.

    stages: one entry per finished stage and generation, in order of the data's flow: {stage, generation, rows_read,
    rows_written, rows_rejected, rows_set_aside, seconds, bytes, files, traffic, created, fingerprint}; traffic is what
    it asked of storage. quality: the evaluation's table with its generation. details: those of
    each stage's manifest, by `stage` or `stage/generation`. live_generation: the one whose model is in `model/`;
    refresh: the rounds (pipeline.rounds).
    """
    workspace = Workspace(config)
    stages: list[dict[str, Any]] = []
    quality: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for stage, generation, manifest in finished_stages(config):
        stages.append(_stage(stage, generation, manifest))
        rest = {key: value for key, value in manifest.details.items() if key != "table"}
        if rest:
            details[stage if generation is None else f"{stage}/{generation}"] = rest
        if stage == "evaluate":
            quality += [{"generation": generation, **row} for row in details_of(manifest, EvaluationDetails)["table"]]
    return {
        "workspace": workspace.root.uri,
        "stages": stages,
        "seconds": round(sum(entry["seconds"] for entry in stages), 3),
        "quality": quality,
        "details": details,
        "live_generation": live_generation(workspace),
        "refresh": [record.model_dump() for record in rounds(workspace)],
    }


def finished_stages(config: RunConfig) -> list[tuple[str, int | None, Manifest]]:
    """(stage, generation or None, manifest) of every whole artifact, in order of the data's flow."""
    workspace = Workspace(config)
    found: list[tuple[str, int | None, Manifest | None]] = [
        ("sample", None, workspace.sample.manifest()),
        ("ingest", None, workspace.corpus.manifest()),
    ]
    for generation in generations(config):
        found += [
            (stage, generation, artifact(workspace, generation).manifest())
            for stage, artifact in [*STAGE_ARTIFACTS.items(), ("score", Workspace.scores)]
            if stage != "ingest"
        ]
    return [(stage, generation, manifest) for stage, generation, manifest in found if manifest is not None]


def generations(config: RunConfig) -> list[int]:
    """Return the numbers of the generations that the workspace holds, ascending."""
    return Workspace(config).generations()


def gains(quality: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per generation, collection and metric, in the order of the evaluation.

    Rows are those of `scoreboard` with `before` and `after`; the first metric of each collection leads.
    """
    return [
        {**row, _BEFORE: row["values"][_BEFORE], _AFTER: row["values"][_AFTER]}
        for row in scoreboard(quality)
        if {_BEFORE, _AFTER} <= row["values"].keys()
    ]


def scoreboard(quality: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per generation, collection and metric, in the order of the evaluation.

    Rows are {generation, collection, metric, values by model, queries, documents}.
    """
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    for entry in quality:
        key = (entry["generation"], entry["collection"], entry["metric"])
        names = ("generation", "collection", "metric", "queries", "documents")
        row = rows.setdefault(key, {**{name: entry[name] for name in names}, "values": {}})
        row["values"][entry["model"]] = entry["value"]
    return list(rows.values())


def _stage(stage: str, generation: int | None, manifest: Manifest) -> dict[str, Any]:
    counts = manifest.counts
    return {
        "stage": stage,
        "generation": generation,
        "rows_read": counts.read,
        "rows_written": counts.written,
        "rows_rejected": counts.rejected,
        "rows_set_aside": counts.set_aside,
        "seconds": manifest.seconds,
        "bytes": sum(part.bytes for part in manifest.parts),
        "files": len(manifest.parts),
        "traffic": manifest.traffic.model_dump(),
        "created": manifest.created,
        "fingerprint": manifest.fingerprint,
    }
