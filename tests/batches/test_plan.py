from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.strata import POOL
from clusterbatch.config import BatchesConfig
from clusterbatch.corpus.partitions import WHOLE_CORPUS
from clusterbatch.errors import UsageError
from tests.batches.indexes import check_epoch, make_index, row_ids


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    size = draw(st.sampled_from([2, 6, 8, 16, 24, 64]))
    largest = draw(st.sampled_from([1, size // 2 + 1, 3 * size]))
    sizes = draw(st.lists(st.lists(st.integers(1, largest), min_size=1, max_size=8), min_size=1, max_size=4))
    stratify = draw(st.sampled_from(["random", "source", "cluster", "group", "random_groups"]))
    layouts = {"cluster": ["cluster", "group"], "group": ["group"], "random_groups": ["cluster", "group"]}
    layout = draw(st.sampled_from(layouts.get(stratify, ["cluster", stratify])))
    config = BatchesConfig(
        stratify=stratify,
        size=size,
        clusters_per_batch=draw(st.sampled_from([None, 1, 2])),
        merged_clusters=draw(st.sampled_from([1, 1, 3])),
        random_share=draw(st.sampled_from([0.0, 0.1, 0.5])),
        seed=draw(st.integers(0, 1000)),
    )
    sizes[0].append(size)
    index = make_index(sizes, run_rows=draw(st.sampled_from([1, 4, 8])), pieces=draw(st.integers(1, 3)))
    return BatchPlan(index, config, layout)


@settings(max_examples=150, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 3))
def test_every_row_once_an_epoch_but_for_counted_repeats(plan: BatchPlan, epoch: int) -> None:
    check_epoch(plan, epoch)


@settings(max_examples=80, deadline=None)
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


@settings(max_examples=40, deadline=None)
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
    sizes = np.random.default_rng(0).integers(40, 200, 60)
    plan = BatchPlan(make_index([sizes.tolist()]), BatchesConfig(size=32, stratify="cluster", clusters_per_batch=1))
    pure = mixed = 0
    for batch in map(plan.batch, range(plan.steps_per_epoch)):
        assert batch.packed.all() or not batch.packed.any()
        if not batch.packed.any():
            pure += 1
            assert batch.purity == 1
        elif not batch.repeated:
            mixed += 1
            around = np.unique(batch.piece)
            # On the ring of 60 clusters all others are on the far side.
            widest_gap = np.diff([*around, around[0] + 60]).max()
            assert 60 - widest_gap < 20
    lendable = (sizes < 1.5 * 32).sum()
    assert (sizes // 32).sum() - lendable <= pure <= (sizes // 32).sum()
    assert mixed > 10


def test_a_last_batch_is_filled_from_where_the_ring_of_remains_begins() -> None:
    plan = BatchPlan(make_index([[40] * 50]), BatchesConfig(size=64, stratify="cluster", clusters_per_batch=1))
    last = next(batch for batch in map(plan.batch, range(plan.steps_per_epoch)) if batch.repeated)
    around = np.unique(last.piece)
    assert 50 - np.diff([*around, around[0] + 50]).max() < 16


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
    for control, batch in ((groups.batch(step), clusters.batch(step)) for step in range(groups.steps_per_epoch)):
        assert np.array_equal(control.group, batch.group)
        assert np.array_equal(control.packed, batch.packed)
        assert control.purity < 0.7
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


def test_a_rare_source_still_comes_and_one_without_weight_does_not() -> None:
    index = make_index([[640], [64], [640]], run_rows=8)
    weights = {"source-1": 0.01, "source-2": 0.0}
    plan = BatchPlan(index, BatchesConfig(size=64, stratify="cluster", source_weights=weights))
    names = Counter(plan.batch(step).stratum.name for step in range(plan.steps_per_epoch))
    assert set(names) == {"source-0", "source-1"}
    assert names["source-1"] == 1
    assert plan.left_out == ["source-2"]


def test_a_source_drawn_rarely_spreads_its_packed_batches_over_the_epochs() -> None:
    index = make_index([[6400], [96] * 20], run_rows=8)
    config = BatchesConfig(size=64, clusters_per_batch=1, source_weights={"source-1": 0.25})
    plan = BatchPlan(index, config)
    packed = [0.0] * 4
    for step in range(4 * plan.steps_per_epoch):
        batch = plan.batch(step)
        if batch.stratum.name == "source-1":
            packed[batch.epoch] += batch.packed.mean()
    assert min(packed) > 0


def test_a_pool_smaller_than_a_batch_borrows_from_the_largest_source() -> None:
    index = make_index([[20], [10], [200, 300], [100]], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=64))
    batch = next(batch for batch in map(plan.batch, range(plan.steps_per_epoch)) if batch.stratum.name == POOL)
    assert batch.repeated == 34
    assert Counter(index.source[batch.piece].tolist()) == {0: 20, 1: 10, 2: 34}


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
        (BatchesConfig(size=64).model_copy(update={"clusters_per_batch": 3}), "batches.clusters_per_batch"),
        (BatchesConfig(size=64, source_weights={"nowhere": 1}), "batches.source_weights.nowhere"),
    ],
)
def test_impossible_plans_are_refused_by_name(config: BatchesConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BatchPlan(make_index([[200, 100]]), config)


@pytest.mark.parametrize(
    ("stratify", "layout"),
    [("cluster", "random"), ("cluster", "source"), ("group", "cluster"), ("random_groups", "source")],
)
def test_a_layout_that_cannot_serve_the_strategy_is_refused(stratify: str, layout: str) -> None:
    with pytest.raises(UsageError, match=f"batches.stratify: {stratify} needs"):
        BatchPlan(make_index([[200, 100]]), BatchesConfig(size=32, stratify=stratify), layout)


def test_sources_cannot_be_told_apart_in_shards_of_the_whole_corpus() -> None:
    index = replace(make_index([[200, 100]]), sources=[WHOLE_CORPUS])
    with pytest.raises(UsageError, match="do not tell sources apart"):
        BatchPlan(index, BatchesConfig(size=32, stratify="source"))


def test_pieces_of_one_cluster_are_one_group() -> None:
    index = make_index([[300, 500]], run_rows=8, pieces=3)
    plan = BatchPlan(index, BatchesConfig(size=64))
    assert plan.strata[0].group_rows.tolist() == [300, 500]
    mixed = 0
    for batch in map(plan.batch, range(plan.steps_per_epoch)):
        if not batch.packed.any():
            assert batch.purity == 1
            mixed += len(np.unique(batch.piece)) > 1
    assert mixed > 0, "runs of all pieces of a cluster must mix"


def test_runs_are_seldom_cut() -> None:
    """Every second read of a run costs bytes: only short runs at the ends of packed batches may be read twice."""
    index = make_index([np.random.default_rng(1).integers(20, 500, 100).tolist()], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=64, clusters_per_batch=1))
    reads: Counter[tuple[int, int]] = Counter()
    for batch in map(plan.batch, range(plan.steps_per_epoch)):
        if not batch.repeated:
            reads.update(set(zip(batch.piece.tolist(), (batch.row // 8).tolist(), strict=True)))
    full_twice = [key for key, times in reads.items() if times > 1 and (key[1] + 1) * 8 <= index.rows[key[0]]]
    assert len(full_twice) <= 2
    assert sum(reads.values()) < 1.02 * len(reads)


def test_the_fingerprint_follows_what_decides_the_batches() -> None:
    index = make_index([[200, 100]])
    plan = BatchPlan(index, BatchesConfig(size=32))
    assert plan.fingerprint == BatchPlan(index, BatchesConfig(size=32, prefetch_bytes=2**20)).fingerprint
    assert plan.fingerprint != BatchPlan(index, BatchesConfig(size=32, seed=1)).fingerprint


@pytest.mark.parametrize("weights", [None, {"source-1": 2.0}])
def test_uniform_clusters_come_equally_often_and_cycle_through_their_rows(weights: dict[str, float] | None) -> None:
    # Clusters of very different sizes; the two smallest of the first source fill no batch, together they do.
    index = make_index([[640, 64, 20, 30], [320, 128, 10]])
    plan = BatchPlan(index, BatchesConfig(size=32, uniform_clusters=True, clusters_per_batch=1, source_weights=weights))
    clusters = np.array([len(stratum.group_rows) for stratum in plan.strata])
    assert clusters.tolist() == [1, 1, 2, 1, 2]
    seen = np.zeros(index.total_rows, int)
    drawn = np.zeros(len(plan.strata), int)
    for step in range(12 * plan.steps_per_epoch):
        batch = plan.batch(step)
        rows = row_ids(index, batch.piece, batch.row)
        assert len(np.unique(rows)) == 32
        assert len(np.unique(index.source[batch.piece])) == 1
        seen[rows] += 1
        drawn[batch.stratum.number] += 1
    wanted = clusters * np.array([1, 1, 1, 2, 2] if weights else [1] * 5)
    assert np.allclose(drawn / drawn.sum(), wanted / wanted.sum(), atol=0.03)
    for stratum, batches in zip(plan.strata, drawn // plan.batches_of_stratum, strict=True):
        rows = [index.first_row[piece] + np.arange(index.rows[piece]) for piece in stratum.pieces]
        # Every row in each whole pass over its cluster.
        assert seen[np.concatenate(rows)].min() >= batches


def test_uniform_clusters_need_clusters() -> None:
    with pytest.raises(ValueError, match="uniform_clusters"):
        BatchesConfig(stratify="source", uniform_clusters=True)
