"""Checks before training starts: refuse what would fail late, or train on something else than was asked for."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from clusterbatch.batches.curriculum import CurriculumPlan, Plan
from clusterbatch.batches.negatives import HARD, IN_BATCH, NegativeChoice
from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import WHOLE_CORPUS
from clusterbatch.encoder.limits import check_limits, starting_model_limits, training_limits
from clusterbatch.errors import UsageError
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.layout import ROWS
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Manifest, Part
from clusterbatch.store.details import ClustersDetails, details_of
from clusterbatch.store.tables import read_parquet


def check_workers(config: RunConfig) -> None:
    """Raise UsageError if a batch has fewer rows than workers, or `ray.mode` allows fewer workers."""
    workers, size = config.train.workers, config.batches.size
    if workers is not None and max(workers) > size:
        raise UsageError(f"train.workers: {max(workers)} workers, but a batch has {size} pairs (batches.size)")
    if workers is not None and config.ray.mode == "in-process" and min(workers) > 1:
        raise UsageError(f"train.workers: {min(workers)} workers need ray.mode=local or cluster; in-process has one")


def check_tokens(config: RunConfig, place: str, clusters: Manifest) -> None:
    """Raise UsageError if the shards hold other tokens than the model would be given from the texts, or no text."""
    limits = training_limits(config) if config.train.evaluate_path is None else starting_model_limits(config)
    check_limits(config.train.model, config.storage, limits, config.train.encoder)
    kept = details_of(clusters, ClustersDetails).get("tokens")
    wanted = Tokenisation.of(config).identity
    changed = [] if kept is None else [name for name in wanted if kept.get(name) != wanted[name]]
    if changed:
        if config.reuse.clusters is not None:
            advice = "run without reuse.clusters, or reuse clusters that were made with this one"
        else:
            advice = "run `clusterbatch cluster` again, with --force"
        raise UsageError(f"{changed[0]}: {place} holds tokens made with another one; {advice}")


def check_vectors(config: RunConfig, place: str, clusters: Manifest) -> None:
    """Raise UsageError if super-batches are to be divided by vectors that the shards do not hold."""
    held = details_of(clusters, ClustersDetails)["layout"]["surrogate_dimensions"]
    if config.batches.largest_super_batch > 1 and not held:
        raise UsageError(f"batches.super_batch: {place} holds no vectors (it was made with cluster.surrogate=none)")


def check_margins(config: RunConfig, place: str, clusters: Manifest, index: ClusterIndex) -> None:
    """Raise UsageError if `train.margin_mse` is on and the shards hold no teacher's margins, or none is used."""
    if not config.train.margin_mse or config.score.is_on:
        return
    if not details_of(clusters, ClustersDetails)["layout"].get("margins"):
        raise UsageError(f"train.margin_mse: {place} was made without mine.margins")
    choice = NegativeChoice.of(config.train, index)
    if choice is not None and (choice.mode == IN_BATCH).all():
        raise UsageError("train.margin_mse compares hard negatives, which train.negatives leaves out for all sources")


def check_scores(config: RunConfig, scores: Artifact, clusters: Manifest) -> Manifest | None:
    """Return the manifest of the teacher's scores that training reads; None if it needs none.

    Raises DataError if they are not made, UsageError if they are those of other clusters.
    """
    if not config.needs_teacher:
        return None
    found = scores.require()
    if found.inputs.get("clusters") != clusters.fingerprint:
        raise UsageError(f"score.teacher: {scores.folder.uri} holds scores of other clusters; run `clusterbatch score`")
    return found


def check_negatives(config: RunConfig, clusters: Artifact, manifest: Manifest, index: ClusterIndex) -> None:
    """Raise UsageError if `train.negatives` names no source, or one that is to train with hard ones alone has none.

    The texts of such a source are read until one is found.
    """
    choice = NegativeChoice.of(config.train, index)
    if choice is None or not choice.names_hard:
        return
    has_lists = details_of(manifest, ClustersDetails)["layout"]["negatives"]
    rows = {part.details["shard"]: part for part in manifest.parts if part.details.get("content") == ROWS}
    for number in np.flatnonzero(choice.mode == HARD).tolist():
        shards = np.unique(index.shard[index.source == number]).tolist()
        name = index.sources[number]
        if not (has_lists and any(_has_negatives(clusters, rows[shard], name) for shard in shards)):
            raise UsageError(f"train.negatives: hard, but the source {name} has no hard negatives")


def _has_negatives(clusters: Artifact, part: Part, source: str) -> bool:
    """Return whether a row of `source` in a shard's text has a hard negative."""
    for group in range(len(part.details["row_groups"])):
        rows = read_parquet(clusters.folder, part, ["source", "negatives"], [group])
        if source != WHOLE_CORPUS:
            rows = rows.filter(pc.equal(rows["source"], source))
        if (pc.sum(pc.list_value_length(rows["negatives"])).as_py() or 0) > 0:
            return True
    return False


def check_phases(plan: Plan, steps: int) -> None:
    """Raise UsageError if training would be over before the last phase of a curriculum begins."""
    if isinstance(plan, CurriculumPlan) and steps <= plan.first_steps[-1]:
        raise UsageError(
            f"batches.curriculum: the last phase begins with step {plan.first_steps[-1]:,}, but the run has {steps:,}; "
            "give more train.steps or train.epochs (a phase that breaks an epoch off counts as one)"
        )
