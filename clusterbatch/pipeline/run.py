"""All stages in order, each skipped when its artifact is there already; then the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from clusterbatch.pipeline.check_inputs import check_inputs
from clusterbatch.pipeline.finished import read_state, record_finished
from clusterbatch.pipeline.other_work import check_no_other_work, with_changed_keys
from clusterbatch.pipeline.report import write_report
from clusterbatch.pipeline.rounds import retire_rounds, settle, wanted_generation
from clusterbatch.runtime import lasting_session
from clusterbatch.scoring.stage import score
from clusterbatch.scoring.teacher import check_teacher
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Manifest, Stopwatch
from clusterbatch.store.details import CorpusDetails, MtebDetails, details_of
from clusterbatch.store.lease import workspace_lease
from clusterbatch.store.workspace import STAGE_ARTIFACTS, Workspace
from clusterbatch.training.checks import check_workers
from clusterbatch.training.stage import train
from clusterbatch.training.starting_model import check_starting_model


class StageFunction(Protocol):
    """Interface of every stage: it makes an artifact, or finds it done, and returns its manifest."""

    def __call__(self, config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest: ...


@dataclass(frozen=True)
class Stage:
    """A stage by name, with its function and its artifact."""

    name: str
    function: StageFunction
    artifact: Callable[[Workspace, int], Artifact]


def measure(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Run the stage `evaluate`, and the MTEB tasks if any are asked for."""
    manifest = evaluate(config, generation=generation, force=force)
    if config.evaluate.mteb:
        measured = evaluate_mteb(config, generation=generation, force=force)
        for row in details_of(measured, MtebDetails)["table"]:
            say(f"mteb      {row['task']} {row['metric']}: {row['model']} {row['value']:.4f}", **row)
    return manifest


_FUNCTIONS: Mapping[str, StageFunction] = {
    "ingest": ingest,
    "embed": embed,
    "cluster": cluster,
    "train": train,
    "evaluate": measure,
}
STAGES = [Stage(name, _FUNCTIONS[name], artifact) for name, artifact in STAGE_ARTIFACTS.items()]
# Only for configurations with a teacher.
SCORE = Stage("score", score, Workspace.scores)


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages of a run in order; `score` is one of them if there is a teacher."""
    place = 1 + [stage.name for stage in STAGES].index("cluster")
    return [*STAGES[:place], *([SCORE] if config.score.is_on else []), *STAGES[place:]]


def is_trained(workspace: Workspace) -> bool:
    """Return whether the first generation was ever trained, even if it has been cleaned away since."""
    return workspace.train().manifest() is not None or bool(wanted_generation(workspace))


def run_stage(stage: Stage, config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Run one stage and say in one line what it did. force: made from scratch, even if it is done.

    Raises UsageError if `force` would replace what another workspace has (`reuse`), and if the generation has been
    cleaned away while a later one is live: made again, its model would replace that.
    """
    workspace = Workspace(config)
    artifact = stage.artifact(workspace, generation)
    if force and artifact.reused:
        raise UsageError(
            f"{artifact.reused}: --force replaces nothing in another workspace ({artifact.folder.uri}); replace it "
            f"there, or run without {artifact.reused}"
        )
    if not force and _is_cleaned_away(stage, workspace, generation):
        raise UsageError(
            f"{artifact.folder.uri}: cleaned away, and generation {wanted_generation(workspace)} is live; `refresh` "
            "continues from that, --force makes the first generation again, in its place"
        )
    before = artifact.manifest()
    if force and stage.name == "train" and generation == 0:
        retire_rounds(workspace)
    watch = Stopwatch()
    with log_context(stage=stage.name, generation=generation):
        try:
            manifest = stage.function(config, generation=generation, force=force)
        except OtherWorkError as error:
            if generation == 0 and stage.name != "ingest":
                raise OtherWorkError(with_changed_keys(str(error), stage.name, artifact, config)) from None
            raise
        same = before is not None and (before.fingerprint, before.created) == (manifest.fingerprint, manifest.created)
        _say_counts(stage.name, manifest, watch.seconds, done_before=same)
    if stage.name == "train" and generation == 0:
        # The stage does not replace the model of a later generation; the records know if it is to be replaced.
        settle(workspace)
    return manifest


def _is_cleaned_away(stage: Stage, workspace: Workspace, generation: int) -> bool:
    """Return whether this stage of the first generation is missing because `clean` has removed it."""
    if stage.name == "ingest" or generation > 0 or stage.artifact(workspace, 0).manifest() is not None:
        return False
    # A training that was begun again is not to be stopped here.
    return not workspace.train().own_files() and bool(wanted_generation(workspace))


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
    """Run all stages and write the report and `metrics.json`; return the report's URI.

    force: what another configuration has made is replaced, what matches is kept.

    Raises UsageError before any work if no corpus or no collection is named, or if training or evaluation could not be
    done; InfrastructureError if another run holds the workspace.
    """
    with workspace_lease(config):
        return run_all(config, force=force)


def run_all(config: RunConfig, *, force: bool = False) -> str:
    """Do what `run` does, for a caller that holds the workspace's lease."""
    if not config.corpus.paths:
        raise UsageError("corpus.paths: give at least one file or folder, or docstrings:// for the built-in sample")
    read = read_state(config)
    check_inputs(config)
    check_workers(config)
    check_starting_model(config)
    check_models(config)
    if Workspace(config).scores().manifest() is None:
        check_teacher(config)
    check_collections(config)
    stages = stages_of(config)
    if not force:
        check_no_other_work(config, [stage.name for stage in stages])
    with lasting_session():
        for stage in stages:
            _kept_or_replaced(stage, config, force)
            if stage.name == "ingest":
                # Whether it has held out a collection shows only now.
                check_collections(config, ingested=True)
                _check_rows_for_a_batch(config)
    report = write_report(config)
    record_finished(config, read)
    return report


def _check_rows_for_a_batch(config: RunConfig) -> None:
    """Raise UsageError if the corpus has fewer rows than a batch: otherwise only the plan of the batches would."""
    sources = details_of(Workspace(config).corpus.require(), CorpusDetails).get("sources", {})
    rows = sum(sources.values())
    if sources and rows < config.batches.size:
        raise UsageError(f"batches.size: a batch of {config.batches.size} pairs, but the corpus has only {rows}")


def _kept_or_replaced(stage: Stage, config: RunConfig, force: bool) -> None:
    workspace = Workspace(config)
    if not force and _is_cleaned_away(stage, workspace, 0):
        say(f"{stage.name:<9} cleaned away; generation {wanted_generation(workspace)} is live")
        return
    try:
        run_stage(stage, config, force=force and _is_cleaned_away(stage, workspace, 0))
    except OtherWorkError:
        if not force:
            raise
    else:
        return
    # Not while the error is handled: it would pass for the cause of whatever fails here.
    run_stage(stage, config, force=True)
