"""The stage `train`: checks, workers until the last step, then the committed artifact with the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from clusterbatch.batches.curriculum import Plan
from clusterbatch.batches.plan_report import left_out_sentences, plan_report
from clusterbatch.clustering.cells import mean_size
from clusterbatch.config import BatchesConfig, RunConfig, fingerprint
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import OtherWorkError
from clusterbatch.log import say
from clusterbatch.runtime import ray_session
from clusterbatch.store import Artifact, Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.details import TrainDetails, details_of
from clusterbatch.store.workspace import Workspace, live_generation, publish
from clusterbatch.training.checks import (
    check_margins,
    check_negatives,
    check_phases,
    check_scores,
    check_tokens,
    check_vectors,
    check_workers,
)
from clusterbatch.training.driver import fit
from clusterbatch.training.metrics import SEGMENTS, check_trackers, read_metrics
from clusterbatch.training.prepare_model import check_adapters
from clusterbatch.training.progress import MASKED
from clusterbatch.training.starting_model import FORMER_LEARNING_RATE, with_learning_rate
from clusterbatch.training.worker import CHECKPOINTS, RAY_FOLDER, Continuation, TrainingJob, checkpoints_of, open_plan

# Steps below which a run warns, and steps after which a model has changed noticeably.
_FEW_STEPS, _ENOUGH_STEPS = 100, 300
# Batches of so many pairs gained nothing from clusters on average over the measured corpora, whose sources held fewer
# than so many batches; in sources of twice as many they gained.
_LARGE_BATCH, _FEW_BATCHES = 128, 100
# Clusters of so many batches gained also where they filled whole batches.
_LARGE_CLUSTERS = 16


def train(
    config: RunConfig, *, generation: int = 0, force: bool = False, continued: Continuation | None = None
) -> Manifest:
    """Train on the clusters of `generation`, from the last whole checkpoint on; return at once if that is done.

    Generation 0 starts from train.model, and its model goes live unless a later one is; a later generation continues as
    `continued` says, and the caller decides whether its model goes live.

    Raises UsageError, before any work, if the configuration does not fit the shards, the model or the cluster.
    """
    assert (generation == 0) == (continued is None)
    workspace = Workspace(config)
    if continued is None:
        clusters, initial_model = workspace.clusters(), config.train.model
        initial = model_fingerprint(resolve_model(initial_model, config.storage))
    else:
        before = workspace.train(continued.base).require()
        clusters, initial_model = workspace.clusters(continued.clusters), workspace.trained_model(continued.base).uri
        initial = before.fingerprint
        trained = details_of(before, TrainDetails)
        seen = trained.get("steps_before", 0) + trained["steps"]
        continued = replace(continued, steps_before=seen)
    inputs = clusters.require()
    check_workers(config)
    check_tokens(config, clusters.folder.uri, inputs)
    check_vectors(config, clusters.folder.uri, inputs)
    scored = workspace.scores(continued.clusters if continued else 0)
    scores = check_scores(config, scored, inputs)
    plan = open_plan(config, clusters, inputs, count_negatives=True)
    check_margins(config, clusters.folder.uri, inputs, plan.index)
    check_negatives(config, clusters, inputs, plan.index)
    if continued is None:
        steps = config.train.steps or plan.steps_of(config.train.epochs or 1)
        check_phases(plan, steps)
    else:
        steps = continued.steps or plan.steps_of(1)
    # A first run's steps are in its configuration.
    rest: list[object] = [] if continued is None else [steps]
    rest += [] if scores is None else [["scores", scores.fingerprint]]
    artifact = workspace.train(generation)

    def identity_of(config: RunConfig) -> str:
        return _identity(config, plan, inputs, initial, *rest)

    config = _with_rate(config, artifact, generation, identity_of, force)
    identity = identity_of(config)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    clusters.check_parts(inputs)
    if scores is not None:
        scored.check_parts(scores)
    check_adapters(config.train)
    check_trackers(config.train.trackers)
    report = plan_report(plan)
    for sentence in left_out_sentences(plan.index.left_out):
        say(f"train.filter: {sentence}")
    for warning in report["warnings"]:
        say(f"plan: {warning}", level="warning")
    if continued is None:
        _warn_of_few_steps(steps, plan.steps_per_epoch)
        rows = None if config.cluster.clusters or config.cluster.column else mean_size(config)
        largest = int(np.bincount(plan.index.source, weights=plan.index.rows).max())
        if (expected := expected_gain(config.batches, rows, largest)) is not None:
            say(expected)
    watch = Stopwatch()
    artifact.begin(identity, force)
    job = TrainingJob(config, generation, steps, initial_model, identity, continued)
    _begin_checkpoints(job, force)
    with ray_session(config.ray):
        fit(job)
    rows = inputs.counts.written
    lines = read_metrics(artifact.folder)
    _warn_of_masked_steps(lines, steps)
    metrics = artifact.write_part("metrics", "jsonl", lines, steps)
    model = artifact.begin(identity)[0].parts
    if continued is None and not live_generation(workspace):
        publish(workspace, generation)
    manifest = artifact.commit(
        identity,
        [
            Receipt(
                unit=0, fingerprint=identity, parts=model, counts=Counts(read=rows, written=rows), seconds=watch.seconds
            )
        ],
        config={"train": config.train.identity(), "batches": config.batches.identity()},
        inputs={
            "clusters": inputs.fingerprint,
            "model": initial,
            **({} if scores is None else {"scores": scores.fingerprint}),
        },
        seconds=watch.seconds,
        details=TrainDetails(
            steps=steps,
            steps_before=continued.steps_before if continued else 0,
            steps_per_epoch=plan.steps_per_epoch,
            model=workspace.trained_model(generation).uri,
            plan=report,
        ),
        extra_parts=[metrics],
    )
    artifact.remove(SEGMENTS)
    artifact.remove(RAY_FOLDER)
    return manifest


def planned_fingerprint(config: RunConfig) -> str:
    """Return the fingerprint of a first training on the finished clusters if it is done as `config` says.

    Raises UsageError if the batches do not fit the shards.
    """
    workspace = Workspace(config)
    clusters = workspace.clusters()
    inputs = clusters.require()
    scores = check_scores(config, workspace.scores(), inputs)
    rest: list[object] = [] if scores is None else [["scores", scores.fingerprint]]
    plan = open_plan(config, clusters, inputs)
    initial = model_fingerprint(resolve_model(config.train.model, config.storage))

    def identity_of(config: RunConfig) -> str:
        return _identity(config, plan, inputs, initial, *rest)

    return identity_of(_with_rate(config, workspace.train(), 0, identity_of, force=False))


def _identity(config: RunConfig, plan: Plan, clusters: Manifest, initial: str, *rest: object) -> str:
    return fingerprint("training run", config.train, plan.fingerprint, clusters.fingerprint, initial, *rest)


def _with_rate(
    config: RunConfig, artifact: Artifact, generation: int, identity_of: Callable[[RunConfig], str], force: bool
) -> RunConfig:
    """Return `config` with `train.learning_rate` filled in if it is unset.

    A run that was begun when one rate was the default for all encoders keeps it, finished or not.
    """
    if config.train.learning_rate is not None:
        return config
    former = config.train.model_copy(update={"learning_rate": FORMER_LEARNING_RATE})
    before = config.model_copy(update={"train": former})
    if not force:
        identity = identity_of(before)
        latest = checkpoints_of(config, generation).latest()
        if artifact.is_done(identity) or (latest is not None and latest.manifest.run_fingerprint == identity):
            return before
    return with_learning_rate(config)


def _begin_checkpoints(job: TrainingJob, force: bool) -> None:
    """Remove checkpoints of another configuration with `force`; without it raise OtherWorkError if there are any."""
    latest = job.checkpoints.latest()
    if latest is None or latest.manifest.run_fingerprint == job.fingerprint:
        return
    if not force:
        raise OtherWorkError(
            f"{job.folder.uri}: holds checkpoints of another configuration or other inputs; "
            "choose another workspace, or pass --force to replace them"
        )
    for name in (CHECKPOINTS, SEGMENTS):
        job.artifact.remove(name)


def expected_gain(batches: BatchesConfig, cluster_rows: int | None, largest_source: int) -> str | None:
    """Return a line for batches that are not expected to gain from clusters; None if nothing is known of them.

    cluster_rows: mean rows of a cluster, None if their number was given; largest_source: rows of the largest source.
    """
    if batches.curriculum or batches.stratify != "cluster":
        return None
    measured = "on measured corpora NDCG@10 changed by"
    if batches.size >= _LARGE_BATCH:
        if largest_source >= _FEW_BATCHES * batches.size:
            return None
        return (
            f"train: batches of {batches.size:,} pairs are not expected to gain from clusters where no source holds "
            f"{_FEW_BATCHES} of them (the largest has {largest_source:,} pairs): {measured} -.004 to +.001 over "
            "batches of one source on average; `compare` measures yours"
        )
    if not batches.random_share and cluster_rows is not None and cluster_rows < _LARGE_CLUSTERS * batches.size:
        return (
            f"train: whole batches of such small clusters are not expected to gain: {measured} 0 over batches of one "
            "source on average, but by +.006 to +.010 with batches.random_share=0.5 and by +.014 to +.019 with "
            "batches.stratify=source batches.super_batch=16; `compare` measures yours"
        )
    return None


def _warn_of_few_steps(steps: int, steps_per_epoch: int) -> None:
    if steps < _FEW_STEPS:
        epochs = math.ceil(_ENOUGH_STEPS / steps_per_epoch)
        say(
            f"train: {steps:,} steps hardly change a model; train.epochs={epochs} would make "
            f"{epochs * steps_per_epoch:,}, and so would a smaller batches.size in fewer epochs",
            level="warning",
        )


def _warn_of_masked_steps(lines: bytes, steps: int) -> None:
    rates = (float(found) for found in re.findall(rb'"mask_rate": ([0-9.e+-]+)', lines))
    masked = sum(rate > MASKED for rate in rates)
    if masked:
        say(
            f"train: in {masked:,} of {steps:,} steps the mask ignored more than {MASKED:.0%} of the negatives; they "
            "taught next to nothing",
            level="warning",
            masked_steps=masked,
        )
