"""Checks before training starts: refuse what would fail late, or train on something else than was asked for."""

from __future__ import annotations

import numpy as np

from clusterbatch.batches.curriculum import CurriculumPlan, Plan
from clusterbatch.batches.loader import SliceLoader
from clusterbatch.clustering.features import unit_length
from clusterbatch.config import RunConfig
from clusterbatch.errors import UsageError
from clusterbatch.log import say
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Manifest
from clusterbatch.store.details import ClustersDetails, details_of

# Documents from this cosine on say nearly the same. From so many of them a row on, clustered batches lost quality in
# the study of batch sizes: they are answers, and the loss takes them for wrong ones.
_NEARLY_EQUAL, _MOST_COPIES = 0.95, 1.0
_LOOKED_AT, _MOST_ROWS = 4, 1024


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
    if config.train.margin_mse and not details_of(clusters, ClustersDetails)["layout"].get("margins"):
        raise UsageError(f"train.margin_mse: {place} was made without mine.margins")


def check_phases(plan: Plan, steps: int) -> None:
    """Raise UsageError if training would be over before the last phase of a curriculum begins."""
    if isinstance(plan, CurriculumPlan) and steps <= plan.first_steps[-1]:
        raise UsageError(
            f"batches.curriculum: the last phase begins with step {plan.first_steps[-1]:,}, but the run has {steps:,}; "
            "give more train.steps or train.epochs (a phase that breaks an epoch off counts as one)"
        )


def near_copies(plan: Plan, reader: ShardReader, steps: int) -> float:
    """Return how many documents of a batch nearly equal a row's own without having its text or its query, on average.

    By the surrogate's vectors, which the shards must hold, over a few batches of the first `steps`.
    """
    found = []
    for step in np.unique(np.linspace(0, steps - 1, min(steps, _LOOKED_AT)).astype(int)).tolist():
        for batch in SliceLoader(plan, reader, 0, 1, step, step + 1, vectors=True):
            assert batch.document_vector is not None, "shards without vectors"
            size = len(batch.document_vector)
            rows = np.random.default_rng(step).permutation(size)[:_MOST_ROWS]
            vectors = unit_length(batch.document_vector[rows].astype(np.float32))
            near = vectors @ vectors.T >= _NEARLY_EQUAL
            for texts in (batch.document_hash[rows], batch.query_hash[rows]):
                near &= texts[:, None] != texts[None, :]
            found.append(near.sum() / max(1, len(rows) * (len(rows) - 1)) * (size - 1))
    return float(np.mean(found))


def warn_of_copies(config: RunConfig, clusters: Manifest, plan: Plan, reader: ShardReader, steps: int) -> None:
    """Say so if clustered batches without the surrogate's mask are expected to lose, for their answers repeat."""
    kept = details_of(clusters, ClustersDetails)["layout"].get("surrogate_dimensions")
    masked = config.train.mask.surrogate_margin is not None
    if config.batches.stratify != "cluster" or masked or not kept:
        return
    copies = near_copies(plan, reader, steps)
    if copies > _MOST_COPIES:
        say(
            f"train: each document has {copies:.1f} near copies in its batch, which count as wrong answers; on a "
            "corpus like that clustered batches lost .03 to .07 NDCG@10 against batches of one source. Mask them "
            "(train.mask.surrogate_margin) or set batches.stratify=source",
            level="warning",
        )
