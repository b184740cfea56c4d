"""Hardness of an arm's batches before any training, and groups as hard as clusters but without a common subject.

Hardness is the surrogate's: the mean, over a batch's queries, of the highest score of another row's document. A
duplicate by its hash is no negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from clusterbatch.batches.loader import SliceBatch, SliceLoader
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.experiments.compare.arms import Arm
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan

_STEPS = 8
_MOST_GROUPS = 64


def hardness(config: RunConfig, clusters: RunConfig, steps: int | None = None) -> float | None:
    """Return the mean hardness over evenly spaced steps of a run of `steps` (by default of one epoch).

    The plan is that of `config` on the clusters of the workspace of `clusters`. None if these keep no vectors, or
    batches have no negatives.
    """
    artifact = Workspace(clusters).clusters()
    if clusters.cluster.surrogate == "none":
        return None
    plan, reader = open_plan(config, artifact, artifact.require()), ShardReader(artifact)
    found = []
    for step in spaced(steps or plan.steps_per_epoch, _STEPS):
        found += [_of_batch(batch) for batch in SliceLoader(plan, reader, 0, 1, step, step + 1, vectors=True)]
    known = [each for each in found if each is not None]
    return float(np.mean(known)) if known else None


def spaced(steps: int, most: int) -> list[int]:
    """Return at most so many steps of a run, evenly spaced: the middle of each stretch."""
    count = min(most, steps)
    found: list[int] = ((np.arange(count) + 0.5) * steps / count).astype(int).tolist()
    return found


def match(arms: Sequence[Arm], layouts: Mapping[str, RunConfig]) -> list[Arm]:
    """The arms, those to be matched with as many groups to a batch as make them about as hard as the first arm of
    clusters; more groups, fewer neighbours of each row."""
    model = next((arm for arm in arms if arm.config.batches.stratify == "cluster" and not arm.matched), None)
    wanted = hardness(model.config, layouts[model.layout]) if model else None
    return [_matched(arm, layouts[arm.layout], wanted) if arm.matched else arm for arm in arms]


def with_groups(arm: Arm, groups: int | None) -> Arm:
    """The arm with so many groups to a batch; as it is where none was chosen."""
    if groups is None:
        return arm
    return replace(arm, config=with_changes(arm.config, {"batches.clusters_per_batch": groups}), matched=False)


def _matched(arm: Arm, layout: RunConfig, wanted: float | None) -> Arm:
    size = arm.config.batches.size
    # At least two rows of a group must meet.
    counts = [groups for groups in (2, 4, 8, 16, 32, _MOST_GROUPS) if size % groups == 0 and 2 * groups <= size]
    candidates = [with_groups(arm, groups) for groups in counts or [1]]
    if wanted is None:
        return candidates[-1]
    distance = [abs((hardness(each.config, layout) or 0.0) - wanted) for each in candidates]
    return candidates[int(np.argmin(distance))]


def _of_batch(batch: SliceBatch) -> float | None:
    assert batch.query_vector is not None
    assert batch.document_vector is not None
    scores = batch.query_vector.astype(np.float32) @ batch.document_vector.astype(np.float32).T
    same = batch.document_hash[:, None] == batch.document_hash[None, :]
    same |= batch.query_hash[:, None] == batch.query_hash[None, :]
    scores[same] = -np.inf
    highest = scores.max(1)
    # A row whose text all others repeat has no negative.
    highest = highest[np.isfinite(highest)]
    return float(highest.mean()) if len(highest) else None
