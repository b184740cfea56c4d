"""Checks before training starts: refuse what would fail late, or train on something else than was asked for."""

from __future__ import annotations

from clusterbatch.batches.curriculum import CurriculumPlan, Plan
from clusterbatch.config import RunConfig
from clusterbatch.errors import UsageError
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.details import ClustersDetails, details_of


def check_workers(config: RunConfig) -> None:
    """Raise UsageError if a batch has fewer rows than workers, or `ray.mode` allows fewer workers."""
    workers, size = config.train.workers, config.batches.size
    if workers is not None and max(workers) > size:
        raise UsageError(f"train.workers: {max(workers)} workers, but a batch has {size} pairs (batches.size)")
    if workers is not None and config.ray.mode == "in-process" and min(workers) > 1:
        raise UsageError(f"train.workers: {min(workers)} workers need ray.mode=cluster; ray.mode=in-process has one")


def check_tokens(config: RunConfig, place: str, clusters: Manifest) -> None:
    """Raise UsageError if the shards hold other tokens than the model would be given from the texts."""
    kept = details_of(clusters, ClustersDetails).get("tokens")
    wanted = Tokenisation.of(config).identity
    changed = [] if kept is None else [name for name in wanted if kept.get(name) != wanted[name]]
    if changed:
        if config.reuse.clusters is not None:
            advice = "run without reuse.clusters, or reuse clusters that were made with this one"
        else:
            advice = "run `clusterbatch cluster` again, with --force"
        raise UsageError(f"{changed[0]}: {place} holds tokens made with another one; {advice}")


def check_margins(config: RunConfig, place: str, clusters: Manifest) -> None:
    """Raise UsageError if `train.margin_mse` is on and the shards hold no teacher's margins."""
    if (
        config.train.margin_mse
        and not config.score.is_on
        and not details_of(clusters, ClustersDetails)["layout"].get("margins")
    ):
        raise UsageError(f"train.margin_mse: {place} was made without mine.margins")


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


def check_phases(plan: Plan, steps: int) -> None:
    """Raise UsageError if training would be over before the last phase of a curriculum begins."""
    if isinstance(plan, CurriculumPlan) and steps <= plan.first_steps[-1]:
        raise UsageError(
            f"batches.curriculum: the last phase begins with step {plan.first_steps[-1]:,}, but the run has {steps:,}; "
            "give more train.steps or train.epochs (a phase that breaks an epoch off counts as one)"
        )
