"""Phases: each keeps the plan's promise, any step is addressed directly, and what an epoch holds does not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from clusterbatch.batches.curriculum import CurriculumPlan, make_plan
from clusterbatch.batches.loader import SliceLoader
from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.batches.samplers import ClusterBatchSampler
from clusterbatch.config import BatchesConfig
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.collectives import World
from tests.batches.indexes import make_index, row_ids
from tests.training.small_run import (
    model_weights,
    same_bits,
    small_config,
    small_job,
    train_on_rank,
    train_until_asked_to_stop,
    write_clusters,
)

_PHASES = [
    {"epochs": 1, "stratify": "random"},
    {"steps": 5, "stratify": "source"},
    {"epochs": 2, "merged_clusters": 4, "clusters_per_batch": 2},
    {"random_share": 0.1},
]


def _config(**changes: object) -> BatchesConfig:
    return BatchesConfig.model_validate({"size": 32, "curriculum": _PHASES, **changes})


@pytest.fixture(scope="module")
def plan() -> CurriculumPlan:
    index = make_index([[100, 70, 90, 61, 130, 50], [45, 200, 33, 80, 64, 71]])
    found = make_plan(index, _config())
    assert isinstance(found, CurriculumPlan)
    return found


def test_every_whole_epoch_of_every_phase_has_every_row(plan: CurriculumPlan) -> None:
    index = plan.index
    whole = {0: "random", 2: "cluster", 3: "cluster", 4: "cluster", 5: "cluster"}
    epoch_of_step = [plan.locate(step)[0] for step in range(plan.steps_of(6))]
    assert epoch_of_step == sorted(epoch_of_step)
    for epoch in range(6):
        steps = [step for step, number in enumerate(epoch_of_step) if number == epoch]
        assert steps == list(range(plan.steps_of(epoch), plan.steps_of(epoch + 1)))
        seen = np.zeros(index.total_rows, int)
        for batch in map(plan.batch, steps):
            assert batch.epoch == epoch
            rows = row_ids(index, batch.piece, batch.row)
            assert len(np.unique(rows)) == 32
            seen[rows] += 1
            if epoch:
                assert len(np.unique(index.source[batch.piece])) == 1
        if epoch in whole:
            assert seen.min() == 1
            assert (seen - 1).sum() < 2 * 32
        else:
            # Five steps of an epoch: broken off.
            assert seen.sum() == 5 * 32


def test_batches_are_what_their_phase_says(plan: CurriculumPlan) -> None:
    first, second, third, fourth = plan.first_steps.tolist()
    sources = [len(np.unique(plan.index.source[plan.batch(step).piece])) for step in range(first, second)]
    assert np.mean(sources) > 1.9
    groups = [len(np.unique(plan.batch(step).group)) for step in range(third, third + 8)]
    # Four clusters merged: two groups in each source, and at most four clusters' rows a part.
    assert max(groups) <= 2
    assert {plan.phase_of(step) for step in range(second, third)} == {1}
    clusters = BatchPlan(plan.index, BatchesConfig(size=32))
    alike = [plan.batch(step).purity for step in range(fourth, fourth + clusters.steps_per_epoch)]
    pure = [clusters.batch(step).purity for step in range(clusters.steps_per_epoch)]
    assert np.mean(pure) - 0.12 < np.mean(alike) < np.mean(pure)


def test_a_step_is_addressed_directly_and_every_key_counts(plan: CurriculumPlan) -> None:
    fresh = make_plan(plan.index, plan.config)
    for step in reversed(range(plan.steps_of(5))):
        one, other = plan.batch(step), fresh.batch(step)
        assert one.step == other.step == step
        assert np.array_equal(row_ids(plan.index, one.piece, one.row), row_ids(plan.index, other.piece, other.row))
    prints = {make_plan(plan.index, _config(curriculum=phases)).fingerprint for phases in (_PHASES, _PHASES[1:], [])}
    assert len(prints | {make_plan(plan.index, _config(random_share=0.2, curriculum=[])).fingerprint}) == 4


def test_phases_of_one_kind_do_not_begin_with_the_same_batches() -> None:
    index = make_index([[100, 70, 90, 61]])
    plan = make_plan(index, BatchesConfig.model_validate({"size": 32, "curriculum": [{"epochs": 1}, {}]}))
    first, second = (plan.batch(step) for step in (0, plan.steps_of(1)))
    assert set(row_ids(index, first.piece, first.row)) != set(row_ids(index, second.piece, second.row))


def test_exchanged_rows_come_from_all_over_the_source() -> None:
    index = make_index([[320] * 20])
    plan = BatchPlan(index, BatchesConfig(size=32, random_share=0.25, clusters_per_batch=1))
    others = [np.unique(plan.batch(step).cluster[-8:]) for step in range(0, plan.steps_per_epoch, 10)]
    assert np.mean([len(each) for each in others]) > 5
    assert len(np.unique(np.concatenate(others))) == 20
    assert np.mean([plan.batch(step).purity for step in range(50)]) == pytest.approx(0.75 + 0.25 / 20, abs=0.03)
    assert any("random_share" in warning for warning in plan_report(plan)["warnings"])


def test_the_report_and_the_samplers_know_phases(plan: CurriculumPlan) -> None:
    report = plan_report(plan)
    assert [phase["strategy"] for phase in report["phases"]] == ["random", "source", "cluster", "cluster"]
    assert [phase["first_step"] for phase in report["phases"]] == plan.first_steps.tolist()
    labels = np.repeat(np.arange(10), 40)
    sampler = ClusterBatchSampler(labels, _config())
    lengths = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        lengths.append(len(list(sampler)))
        assert lengths[-1] == len(sampler)
    assert lengths[1] == 5


@pytest.mark.parametrize("phases", [[{"stratify": "random"}, {}], [{"epochs": 1}], [{"epochs": 1, "steps": 3}, {}]])
def test_a_curriculum_without_sense_is_refused(phases: list[dict]) -> None:
    with pytest.raises(ValidationError):
        _config(curriculum=phases)


def test_training_resumes_in_the_middle_of_a_phase_bit_for_bit(tmp_path: Path) -> None:
    phases = [{"steps": 6, "stratify": "random"}, {"steps": 9, "stratify": "source"}, {"random_share": 0.1}]
    jobs = {}
    for name in ("undisturbed", "stopped"):
        settings = {"train": {"steps": 24}, "batches": {"curriculum": phases}}
        config = small_config(tmp_path, workspace=str(tmp_path / name), **settings)
        write_clusters(config)
        jobs[name] = small_job(config)
    plan = make_plan(ShardReader(Workspace(config).clusters()).index, config.batches)
    loader = SliceLoader(plan, ShardReader(Workspace(config).clusters()), 0, 1, 0, 24)
    assert [batch.composition.stratum for batch in loader][:6] == ["(all)"] * 6
    train_on_rank(World(), jobs["undisturbed"])
    for steps in (4, 7, 8):
        # Into the first phase, into the second, into the third.
        assert "stopped" in train_until_asked_to_stop(World(), jobs["stopped"], steps)
    train_on_rank(World(), jobs["stopped"])
    assert same_bits(model_weights(jobs["undisturbed"]), model_weights(jobs["stopped"]))
