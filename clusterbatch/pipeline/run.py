"""All stages in order, each skipped when its artifact is there already; then the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from clusterbatch.config import RunConfig
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.errors import OtherWorkError, UsageError
from clusterbatch.evaluation.checks import check_collections, check_models
from clusterbatch.evaluation.mteb import evaluate_mteb
from clusterbatch.evaluation.stage import evaluate
from clusterbatch.log import log_context, say
from clusterbatch.pipeline.report import write_report
from clusterbatch.runtime import lasting_session
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Manifest, Stopwatch
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.checks import check_workers
from clusterbatch.training.stage import train
from clusterbatch.training.starting_model import check_starting_model


class StageFunction(Protocol):
    """What every stage is: it makes an artifact, or finds it done, and returns its manifest."""

    def __call__(self, config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest: ...


@dataclass(frozen=True)
class Stage:
    """A stage by name: what does it, and where its artifact lies."""

    name: str
    function: StageFunction
    artifact: Callable[[Workspace, int], Artifact]


def measure(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """The stage `evaluate`, and the MTEB tasks where any are asked for."""
    manifest = evaluate(config, generation=generation, force=force)
    if config.evaluate.mteb:
        for row in evaluate_mteb(config, generation=generation, force=force).details["table"]:
            say(f"mteb      {row['task']} {row['metric']}: {row['model']} {row['value']:.4f}", **row)
    return manifest


STAGES = [
    Stage("ingest", ingest, lambda workspace, _: workspace.corpus),
    Stage("embed", embed, Workspace.embeddings),
    Stage("cluster", cluster, Workspace.clusters),
    Stage("train", train, Workspace.train),
    Stage("evaluate", measure, Workspace.evaluation),
]


def run_stage(stage: Stage, config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """One stage, with a line at its end that says what it did. force: it is made anew, even where it is done.

    Raises UsageError where `force` would replace what another workspace has (`reuse`).
    """
    artifact = stage.artifact(Workspace(config), generation)
    if force and artifact.reused:
        raise UsageError(
            f"{artifact.reused}: --force replaces nothing in another workspace ({artifact.folder.uri}); make it anew "
            f"there, or run without {artifact.reused}"
        )
    before = artifact.manifest()
    watch = Stopwatch()
    with log_context(stage=stage.name, generation=generation):
        manifest = stage.function(config, generation=generation, force=force)
        same = before is not None and (before.fingerprint, before.created) == (manifest.fingerprint, manifest.created)
        _say_counts(stage.name, manifest, watch.seconds, done_before=same)
    return manifest


def _say_counts(name: str, manifest: Manifest, seconds: float, *, done_before: bool) -> None:
    if done_before:
        say(f"{name:<9} done already", fingerprint=manifest.fingerprint)
        return
    counts = manifest.counts
    aside = "".join(f", {rows:,} {reason}" for reason, rows in counts.set_aside.items() if rows)
    say(
        f"{name:<9} {counts.read:,} rows read, {counts.written:,} written, {counts.rejected:,} rejected{aside} "
        f"({seconds:.1f} s)",
        **counts.model_dump(),
        seconds=round(seconds, 3),
        fingerprint=manifest.fingerprint,
    )


def run(config: RunConfig, *, force: bool = False) -> str:
    """Runs all stages and writes the report and `metrics.json`; returns the report's URI.

    force: what another configuration has made is replaced, what matches is kept.

    Raises UsageError before any work where no corpus or no collection is named, or what training and evaluation need
    cannot be.
    """
    if not config.corpus.paths:
        raise UsageError("corpus.paths: give at least one file or folder, or docstrings:// for the built-in sample")
    check_workers(config)
    check_starting_model(config)
    check_models(config)
    check_collections(config)
    with lasting_session():
        for stage in STAGES:
            _kept_or_replaced(stage, config, force)
            if stage.name == "ingest":
                # Whether it has held out a collection shows only now.
                check_collections(config, ingested=True)
    return write_report(config)


def _kept_or_replaced(stage: Stage, config: RunConfig, force: bool) -> None:
    try:
        run_stage(stage, config)
    except OtherWorkError:
        if not force:
            raise
        run_stage(stage, config, force=True)
