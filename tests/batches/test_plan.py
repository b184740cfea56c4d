from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.strata import POOL
from clusterbatch.config import BatchesConfig
from clusterbatch.errors import UsageError
from tests.batches.indexes import make_index, row_ids


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    size = draw(st.sampled_from([2, 6, 8, 16, 24, 64]))
    largest = draw(st.sampled_from([3, 20, 100, 300]))
    sizes = draw(st.lists(st.lists(st.integers(1, largest), min_size=1, max_size=12), min_size=1, max_size=5))
    stratify = draw(st.sampled_from(["random", "source", "cluster", "random_groups"]))
    layout = "cluster" if stratify in ("cluster", "random_groups") else draw(st.sampled_from(["cluster", stratify]))
    config = BatchesConfig(
        stratify=stratify,
        size=size,
        clusters_per_batch=draw(st.sampled_from([None, 1, 2])),
        seed=draw(st.integers(0, 1000)),
    )
    if sum(map(sum, sizes)) < size:
        sizes[0].append(size)
    return BatchPlan(make_index(sizes, run_rows=draw(st.sampled_from([1, 4, 8]))), config, layout)


@settings(max_examples=500, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 3))
def test_every_row_once_an_epoch_but_for_counted_repeats(plan: BatchPlan, epoch: int) -> None:
    index, size = plan.index, plan.config.size
    seen = np.zeros(index.total_rows, int)
    repeats: Counter[str] = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        batch = plan.batch(step)
        assert len(batch) == size
        assert batch.epoch == epoch
        assert np.all((batch.row >= 0) & (batch.row < index.rows[batch.piece]))
        rows = row_ids(index, batch.piece, batch.row)
        assert len(np.unique(rows)) == size, "a row twice in one batch"
        seen[rows] += 1
        repeats[batch.stratum.name] += batch.repeated
        if plan.config.stratify != "random" and batch.stratum.name != POOL:
            assert len(np.unique(index.source[batch.piece])) == 1, "a batch of two sources"
    assert seen.min() == 1, "a row was left out"
    assert (seen - 1).sum() == sum(repeats.values())
    assert max(repeats.values()) < size


@settings(max_examples=150, deadline=None)
@given(plan=plans(), workers=st.integers(1, 7))
def test_slices_partition_the_batch_and_differ_by_at_most_a_run(plan: BatchPlan, workers: int) -> None:
    run_rows = plan.index.run_rows
    for step in range(min(plan.steps_per_epoch, 5)):
        bounds = plan.batch(step).slice_bounds(workers, run_rows)
        rows = np.diff(bounds)
        assert bounds[0] == 0
        assert bounds[-1] == plan.config.size
        assert rows.min() >= 0
        assert rows.max() - rows.min() <= max(run_rows, 1)


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_a_step_does_not_depend_on_the_steps_before(plan: BatchPlan) -> None:
    fresh = BatchPlan(plan.index, plan.config, plan.layout)
    steps = list(range(2 * plan.steps_per_epoch))
    forward = {step: plan.batch(step) for step in steps}
    for step in reversed(steps):
        batch = fresh.batch(step)
        assert np.array_equal(batch.piece, forward[step].piece)
        assert np.array_equal(batch.row, forward[step].row)


def test_full_batches_are_pure_and_remains_meet_their_neighbours() -> None:
    index = make_index([[100, 90, 130, 75]], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=32, stratify="cluster", clusters_per_batch=1))
    pure = mixed = 0
    for step in range(plan.steps_per_epoch):
        batch = plan.batch(step)
        clusters = np.unique(batch.piece)
        if batch.purity == 1:
            pure += 1
        elif not batch.repeated:
            mixed += 1
            around = np.sort(clusters)
            # Neighbours on the ring: consecutive, or around its end.
            assert np.all(np.diff(around) == 1) or {0, 3} <= set(around.tolist())
    assert pure == 100 // 32 + 90 // 32 + 130 // 32 + 75 // 32
    assert mixed >= 1


def test_runs_are_permuted_each_epoch_and_kept_together() -> None:
    index = make_index([[512]], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=64, stratify="cluster"))
    batches = [
        [tuple(sorted(set((plan.batch(epoch * 8 + step).row // 8).tolist()))) for step in range(8)]
        for epoch in range(2)
    ]
    assert all(len(runs) == 8 for epoch in batches for runs in epoch), "a batch must consist of whole runs"
    assert set(batches[0]) != set(batches[1]), "the same batches in both epochs"


def test_clusters_hardly_larger_than_a_batch_do_not_repeat_their_batches() -> None:
    index = make_index([[32] * 20], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=32, stratify="cluster", clusters_per_batch=1))
    batches = [
        {frozenset(row_ids(index, b.piece, b.row).tolist()) for b in map(plan.batch, range(e * 20, e * 20 + 20))}
        for e in range(2)
    ]
    assert len(batches[0] & batches[1]) < 15


def test_random_groups_have_the_sizes_of_the_clusters_but_rows_from_everywhere() -> None:
    index = make_index([[400, 200, 300]], run_rows=8)
    groups, clusters = (
        BatchPlan(index, BatchesConfig(size=64, stratify=stratify, clusters_per_batch=1))
        for stratify in ("random_groups", "cluster")
    )
    assert groups.steps_per_epoch == clusters.steps_per_epoch
    assert [groups.batch(s).purity for s in range(10)] == [clusters.batch(s).purity for s in range(10)]
    members: dict[int, set[int]] = {}
    for epoch in range(2):
        seen: dict[int, set[int]] = {}
        for step in range(groups.steps_per_epoch):
            batch = groups.batch(epoch * groups.steps_per_epoch + step)
            for group, row in zip(batch.group, row_ids(index, batch.piece, batch.row), strict=True):
                seen.setdefault(int(group), set()).add(int(row))
        assert members in ({}, seen), "membership must not change between epochs"
        members = seen
    assert [len(members[group]) for group in range(3)] == [400, 200, 300]
    # 400 rows drawn from 900: the share from cluster 0 must be near 400 / 900.
    assert abs(np.mean([row < 400 for row in members[0]]) - 4 / 9) < 0.1


def test_random_batches_mix_all_sources() -> None:
    index = make_index([[500], [500]], run_rows=64)
    plan = BatchPlan(index, BatchesConfig(size=100, stratify="random"))
    shares = [np.mean(index.source[plan.batch(step).piece] == 0) for step in range(plan.steps_per_epoch)]
    assert min(shares) > 0.3
    assert max(shares) < 0.7


def test_source_weights_change_the_share_and_still_cycle_through_all_rows() -> None:
    index = make_index([[640], [640]], run_rows=8)
    config = BatchesConfig(size=64, stratify="cluster", source_weights={"source-0": 3.0})
    plan = BatchPlan(index, config)
    counts: Counter[str] = Counter()
    seen = np.zeros(index.total_rows, int)
    for step in range(2 * plan.steps_per_epoch):
        batch = plan.batch(step)
        counts[batch.stratum.name] += 1
        seen[row_ids(index, batch.piece, batch.row)] += 1
    assert counts == {"source-0": 30, "source-1": 10}
    assert set(seen[:640]) == {3}
    assert set(seen[640:]) == {1}


def test_clusters_per_batch_follows_from_the_sizes() -> None:
    small = BatchPlan(make_index([[100] * 50], run_rows=8), BatchesConfig(size=256))
    large = BatchPlan(make_index([[10_000] * 5], run_rows=8), BatchesConfig(size=256))
    assert large.strata[0].groups_per_batch == 1
    assert small.strata[0].groups_per_batch > 2


def test_small_sources_are_pooled_or_left_out() -> None:
    index = make_index([[20], [30], [500]], run_rows=8)
    pooled = BatchPlan(index, BatchesConfig(size=64))
    assert [stratum.name for stratum in pooled.strata] == ["source-2", POOL]
    assert list(pooled.strata[1].sources) == ["source-0", "source-1"]
    left = BatchPlan(index, BatchesConfig(size=64, small_sources="leave_out"))
    assert left.left_out == ["source-0", "source-1"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BatchesConfig(size=1000), "batches.size"),
        (BatchesConfig(size=64, clusters_per_batch=3), "batches.clusters_per_batch"),
        (BatchesConfig(size=64, source_weights={"nowhere": 1}), "batches.source_weights.nowhere"),
        (BatchesConfig(size=64, source_weights={"source-0": -1}), "batches.source_weights.source-0"),
    ],
)
def test_impossible_plans_are_refused_by_name(config: BatchesConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BatchPlan(make_index([[200, 100]]), config)


def test_the_fingerprint_follows_what_decides_the_batches() -> None:
    index = make_index([[200, 100]])
    plan = BatchPlan(index, BatchesConfig(size=32))
    assert plan.fingerprint == BatchPlan(index, BatchesConfig(size=32, prefetch_bytes=2**20)).fingerprint
    assert plan.fingerprint != BatchPlan(index, BatchesConfig(size=32, seed=1)).fingerprint
