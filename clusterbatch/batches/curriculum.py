"""Plans that change during training: phases one after the other, each a plan of its own.

A phase begins at a step that follows from the phases before it, so any step is still addressed directly, and resuming
needs nothing but its number. Inside a phase the plan's promise holds for each of its epochs: every row at least once. A
phase that is given in steps may end in the middle of an epoch; the rest of that epoch is then not seen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from clusterbatch.batches.plan import PLAN_VERSION, BatchPlan, GlobalBatch
from clusterbatch.batches.super_batches import SuperBatchPlan, Vectors
from clusterbatch.config import BatchesConfig, fingerprint
from clusterbatch.shards.index import ClusterIndex


class Plan(Protocol):
    """Interface of a plan, as training uses it."""

    index: ClusterIndex
    config: BatchesConfig
    layout: str
    fingerprint: str

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def moves_rows(self) -> bool: ...

    def batch(self, step: int) -> GlobalBatch: ...

    def locate(self, step: int) -> tuple[int, int]: ...

    def steps_of(self, epochs: int) -> int: ...


def make_plan(
    index: ClusterIndex, config: BatchesConfig, layout: str = "cluster", vectors: Vectors | None = None
) -> Plan:
    """Return the plan that `config` asks for, in phases if it has a curriculum.

    layout: strategy by which the shards were laid out: cluster, group, source or random. vectors: function of pieces
    (n,) and rows inside them (n,) that returns the unit vectors (n, m) of their queries and of their documents, for
    super-batches (`StoredVectors`); without it such a plan has steps, but no batches. Raises UsageError if the
    configuration makes no plan over these shards.
    """
    if config.curriculum:
        return CurriculumPlan(index, config, layout, vectors)
    return _plan_of_phase(index, config, layout, 0, vectors)


def _plan_of_phase(
    index: ClusterIndex, config: BatchesConfig, layout: str, first_epoch: int, vectors: Vectors | None
) -> BatchPlan:
    if config.super_batch > 1:
        return SuperBatchPlan(index, config, layout, first_epoch, vectors)
    return BatchPlan(index, config, layout, first_epoch)


class CurriculumPlan:
    """The phases of `config.curriculum`; epochs are numbered through all of them, each phase begins a new one.

    plans: one per phase; first_steps: the step that each begins at.
    """

    def __init__(
        self, index: ClusterIndex, config: BatchesConfig, layout: str = "cluster", vectors: Vectors | None = None
    ) -> None:
        self.index, self.config, self.layout = index, config, layout
        self.plans: list[BatchPlan] = []
        self._epochs: list[int] = []
        steps = [0]
        for phase, batches in zip(config.curriculum, config.phases, strict=True):
            plan = _plan_of_phase(index, batches, layout, sum(self._epochs), vectors)
            length = plan.steps_of(phase.epochs) if phase.epochs else phase.steps or 0
            self.plans.append(plan)
            self._epochs.append(-(-length // plan.steps_per_epoch))
            steps.append(steps[-1] + length)
        self.first_steps = np.array(steps[:-1])
        self.fingerprint = fingerprint("curriculum", PLAN_VERSION, config, layout, index.fingerprint)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch of the last phase, which lasts longest."""
        return self.plans[-1].steps_per_epoch

    @property
    def moves_rows(self) -> bool:
        return any(plan.moves_rows for plan in self.plans)

    def phase_of(self, step: int) -> int:
        return int(np.searchsorted(self.first_steps, step, side="right")) - 1

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of step `step` (counted from 0 through all phases)."""
        phase = self.phase_of(step)
        return replace(self.plans[phase].batch(step - int(self.first_steps[phase])), step=step)

    def locate(self, step: int) -> tuple[int, int]:
        phase = self.phase_of(step)
        return self.plans[phase].locate(step - int(self.first_steps[phase]))

    def steps_of(self, epochs: int) -> int:
        """Return the steps of the first `epochs` epochs; one that a phase breaks off counts as one."""
        before = 0
        for phase, plan in enumerate(self.plans[:-1]):
            if epochs < before + self._epochs[phase]:
                return int(self.first_steps[phase]) + plan.steps_of(epochs - before)
            before += self._epochs[phase]
        return int(self.first_steps[-1]) + self.plans[-1].steps_of(epochs - before)
