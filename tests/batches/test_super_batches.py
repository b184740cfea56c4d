from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.batches import SliceLoader
from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.batches.row_reader import StoredVectors
from clusterbatch.batches.samplers import ClusterBatchSampler
from clusterbatch.batches.super_batches import SuperBatchPlan, Vectors, divide
from clusterbatch.config import BatchesConfig, load_config
from clusterbatch.errors import DataError, UsageError
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store import Folder
from tests.batches.indexes import check_epoch, make_index, row_ids
from tests.clustering.synthetic import build_shards
from tests.clustering.test_assign import unit

SIZES = {"a": [100, 220, 64], "b": [300, 90], "c": [20]}


def vectors_of(index: ClusterIndex) -> Vectors:
    queries, documents = (unit(index.total_rows, 6, seed) for seed in (0, 1))

    def found(piece: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = row_ids(index, piece, row)
        return queries[rows], documents[rows]

    return found


@st.composite
def plans(draw: st.DrawFn) -> SuperBatchPlan:
    size = draw(st.sampled_from([2, 6, 16]))
    largest = draw(st.sampled_from([1, size // 2 + 1, 9 * size]))
    sizes = draw(st.lists(st.lists(st.integers(1, largest), min_size=1, max_size=6), min_size=1, max_size=4))
    stratify = draw(st.sampled_from(["random", "source"]))
    config = BatchesConfig(
        stratify=stratify, size=size, super_batch=draw(st.integers(2, 9)), seed=draw(st.integers(0, 1000))
    )
    sizes[0].append(size)
    index = make_index(sizes, run_rows=draw(st.sampled_from([1, 4, 8])))
    return SuperBatchPlan(index, config, draw(st.sampled_from(["cluster", stratify])), vectors=vectors_of(index))


@settings(max_examples=150, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 2))
def test_every_row_once_an_epoch_but_for_counted_repeats(plan: SuperBatchPlan, epoch: int) -> None:
    check_epoch(plan, epoch)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), steps=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_step_is_the_same_whatever_came_before(plan: SuperBatchPlan, steps: list[int]) -> None:
    for step in steps:
        fresh = SuperBatchPlan(plan.index, plan.config, plan.layout, vectors=vectors_of(plan.index))
        one, other = plan.batch(step), fresh.batch(step)
        assert np.array_equal(row_ids(plan.index, one.piece, one.row), row_ids(plan.index, other.piece, other.row))


@settings(max_examples=60, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 1))
def test_the_parts_of_a_super_batch_are_consecutive_steps(plan: SuperBatchPlan, epoch: int) -> None:
    """Their rows are those of so many batches of the plan without super-batches."""
    size, times = plan.config.size, plan.config.super_batch
    steps = [plan.batch(step) for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)]
    for stratum in plan.strata:
        of_stratum = [batch for batch in steps if batch.stratum is stratum]
        # Rows that complete a batch come last.
        own = [row_ids(plan.index, each.piece, each.row)[: size - each.repeated].tolist() for each in of_stratum]
        piece, row, _, _ = plan.sequence(stratum, epoch).rows(0, stratum.rows)
        drawn = row_ids(plan.index, piece, row).tolist()
        super_batches = [set(drawn[start : start + times * size]) for start in range(0, len(drawn), times * size)]
        while own:
            together = next(rows for rows in super_batches if own[0][0] in rows)
            parts = -(-len(together) // size)
            assert set().union(*own[:parts]) == together
            own = own[parts:]


def _reference(queries: np.ndarray, documents: np.ndarray, size: int) -> list[int]:
    """The rule, with Python's whole numbers."""
    q, d = ([[round(float(v) * 1024) for v in row] for row in each] for each in (queries, documents))

    def score(i: int, j: int) -> int:
        return sum(a * b for a, b in zip(q[i], d[j], strict=True)) + sum(a * b for a, b in zip(q[j], d[i], strict=True))

    left, found = list(range(len(q))), []
    while len(left) > size:
        first = left.pop(0)
        near = sorted(left, key=lambda other: (-score(first, other), left.index(other)))[: size - 1]
        found += [first, *near]
        left = [row for row in left if row not in near]
    return found + left


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rows", [1, 5, 16, 61])
def test_near_rows_share_a_batch(rows: int, dtype: type) -> None:
    queries, documents = (unit(rows, 12, seed).astype(dtype) for seed in (2, 3))
    assert divide(queries, documents, 5).tolist() == _reference(queries, documents, 5)


def test_the_order_of_sums_changes_nothing() -> None:
    """As with another processor's products: dimensions in another order, in pieces, or of twice the precision."""
    queries, documents = (unit(600, 384, seed).astype(np.float16) for seed in (4, 5))
    # Near copies, whose scores differ by little.
    documents[1::2] = documents[::2]
    expected = divide(queries, documents, 32)
    shuffled = np.random.default_rng(0).permutation(384)
    assert np.array_equal(divide(queries[:, shuffled], documents[:, shuffled], 32), expected)
    assert np.array_equal(divide(queries.astype(np.float64), documents.astype(np.float64), 32), expected)


def test_batches_are_harder_the_more_are_divided_together() -> None:
    index, hardness = make_index([[4000]]), []
    queries = unit(4000, 8, 0)
    documents = queries + 0.3 * unit(4000, 8, 1)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    for times in (1, 4, 16):
        config = BatchesConfig(size=16, stratify="source", super_batch=times)
        plan = make_plan(index, config, "cluster", lambda piece, row: (queries[row], documents[row]))
        batches = [plan.batch(step).row for step in range(plan.steps_per_epoch)]
        scores = np.array([queries[rows] @ documents[rows].T for rows in batches])
        hardness.append(scores[:, ~np.eye(16, dtype=bool)].mean())
    assert hardness[2] > hardness[1] + 0.1
    assert hardness[1] > hardness[0] + 0.1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_slices_together_are_the_planned_rows(tmp_path: Path, world_size: int) -> None:
    artifact, written = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    config = BatchesConfig(size=32, stratify="source", super_batch=4)

    def plan() -> BatchPlan:
        # Each rank has its own.
        return SuperBatchPlan(reader.index, config, "cluster", vectors=StoredVectors(reader, reader.index))

    steps, planned = 2 * plan().steps_per_epoch, plan()
    loaders = [SliceLoader(plan(), reader, rank, world_size, 0, steps) for rank in range(world_size)]
    for step, slices in enumerate(zip(*loaders, strict=True)):
        batch = planned.batch(step)
        names = [reader.index.sources[source] for source in reader.index.source[batch.piece]]
        places = zip(names, reader.index.cluster[batch.piece].tolist(), batch.row.tolist(), strict=True)
        hashes = np.concatenate([part.query_hash for part in slices])
        assert hashes.tolist() == [written[name, cluster]["query_hash"][row].as_py() for name, cluster, row in places]
        assert all(part.query_vector is None for part in slices)


def test_stored_vectors_are_those_of_the_rows(tmp_path: Path) -> None:
    artifact, written = build_shards(Folder(str(tmp_path)), SIZES, shard_rows=150)
    reader = ShardReader(artifact)
    index = reader.index
    random = np.random.default_rng(0)
    piece = random.integers(0, len(index.rows), 70)
    row = random.integers(0, index.rows[piece])
    queries, documents = StoredVectors(reader, index)(piece, row)
    for place in range(len(piece)):
        table = written[index.sources[index.source[piece[place]]], int(index.cluster[piece[place]])]
        expected = table.slice(int(row[place]), 1)
        assert queries[place].tolist() == expected["query_vector"][0].as_py()
        assert documents[place].tolist() == expected["document_vector"][0].as_py()


def test_shards_without_vectors_are_named(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES, dimensions=None)
    reader = ShardReader(artifact)
    plan = make_plan(
        reader.index,
        BatchesConfig(size=16, stratify="source", super_batch=2),
        "cluster",
        StoredVectors(reader, reader.index),
    )
    with pytest.raises(DataError, match="without the surrogate's vectors"):
        plan.batch(0)


def test_a_curriculum_has_them_too() -> None:
    index = make_index([[90, 70], [40]])
    phases = [{"steps": 3, "stratify": "random"}, {}]
    config = BatchesConfig(size=8, stratify="source", super_batch=3, curriculum=phases)
    plan = make_plan(index, config, "cluster", vectors_of(index))
    alone = BatchesConfig(size=8, stratify="random", super_batch=3)
    first = make_plan(index, alone, "cluster", vectors_of(index)).batch(2)
    assert np.array_equal(plan.batch(2).row, first.row)
    assert len({plan.batch(step).stratum.name for step in range(3, 3 + plan.steps_per_epoch)}) == 2


def test_a_phase_may_begin_or_end_them() -> None:
    index = make_index([[90, 70], [40]])
    phases = [{"epochs": 1}, {"super_batch": 3, "steps": 10}, {"super_batch": 1, "stratify": "random"}]
    config = BatchesConfig(size=8, stratify="source", curriculum=phases)
    assert config.largest_super_batch == 3
    plan = make_plan(index, config, "cluster", vectors_of(index))
    assert [isinstance(each, SuperBatchPlan) for each in plan.plans] == [False, True, False]
    alone = BatchesConfig(size=8, stratify="source", super_batch=3)
    begun = plan.plans[0].steps_of(1)
    divided = make_plan(index, alone, "cluster", vectors_of(index))
    # The second phase has the second epoch.
    assert np.array_equal(plan.batch(begun + 2).row, divided.batch(divided.steps_of(1) + 2).row)
    report = plan_report(plan)
    assert [phase["strategy"] for phase in report["phases"]] == ["source", "source", "random"]
    with pytest.raises(UsageError, match="vectors"):
        ClusterBatchSampler(np.zeros(200, int), config)


def test_a_sampler_divides_by_the_vectors_of_its_rows() -> None:
    labels = np.repeat(["x", "y"], [120, 60])
    queries = documents = unit(180, 6, 0)
    config = BatchesConfig(size=12, stratify="source", super_batch=5)
    sampler = ClusterBatchSampler(np.zeros(180, int), config, sources=labels, vectors=(queries, documents))
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(180))
    for batch in batches:
        assert len({labels[row] for row in batch}) == 1
    plain = ClusterBatchSampler(np.zeros(180, int), BatchesConfig(size=12, stratify="source"), sources=labels)

    def mean_score(batches: list[list[int]]) -> float:
        return float(np.mean([(queries[batch] @ documents[batch].T).mean() for batch in batches]))

    assert mean_score(batches) > mean_score(list(plain)) + 0.02
    with pytest.raises(UsageError, match="vectors"):
        ClusterBatchSampler(labels, config)
    with pytest.raises(UsageError, match=r"vectors: of shape \(10, 6\)"):
        ClusterBatchSampler(labels, config, vectors=(queries[:10], documents))
    for damaged in (3 * documents, np.where(documents > 0.9, np.nan, documents)):
        with pytest.raises(UsageError, match="longer than 1"):
            ClusterBatchSampler(labels, config, vectors=(queries, damaged))
    with pytest.raises(UsageError, match="vectors: 6 and 5 dimensions"):
        ClusterBatchSampler(labels, config, vectors=(queries, documents[:, :5]))


def test_a_sampler_does_not_resume_with_other_vectors() -> None:
    """They decide which rows share a batch: the rest of the epoch would repeat some rows and leave others out."""
    labels, config = np.zeros(180, int), BatchesConfig(size=12, stratify="source", super_batch=5)
    one, same, other = (
        ClusterBatchSampler(labels, config, vectors=(unit(180, 6, seed), unit(180, 6, 9))) for seed in (0, 0, 1)
    )
    assert same.resume(one.state(5)) == 0
    assert list(same) == list(one)[5:] != list(other)[5:]
    with pytest.raises(UsageError, match="other labels, vectors"):
        other.resume(one.state(5))
    late = BatchesConfig(size=12, stratify="source", curriculum=[{"epochs": 1}, {"super_batch": 5}])
    one, other = (ClusterBatchSampler(labels, late, vectors=(unit(180, 6, seed), unit(180, 6, 9))) for seed in (0, 1))
    with pytest.raises(UsageError, match="other labels, vectors"):
        other.resume(one.state(5))
    plain = BatchesConfig(size=12)
    # Without super-batches they decide nothing.
    unused = ClusterBatchSampler(labels, plain, vectors=(unit(180, 6, 0), unit(180, 6, 9)))
    assert unused.resume(ClusterBatchSampler(labels, plain).state(5)) == 0


def test_the_report_of_a_plan_knows_its_steps() -> None:
    index = make_index([[90, 70], [40]])
    config = BatchesConfig(size=8, stratify="source", super_batch=3)
    report = plan_report(make_plan(index, config, "cluster", vectors_of(index)))
    assert report["steps_per_epoch"] == 25
    assert 0.5 <= report["purity"] <= 1


def test_reading_is_counted_by_super_batches(tmp_path: Path) -> None:
    """As what a loader reads: batches of half a run, of shards made for sources."""
    artifact, _ = build_shards(Folder(str(tmp_path)), {"a": [640], "b": [320]}, run_rows=16)
    reader = ShardReader(artifact)
    config = BatchesConfig(size=8, stratify="source", super_batch=4)
    plan = make_plan(reader.index, config, "source", StoredVectors(reader, reader.index))
    loader = SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch)
    assert sum(len(batch) for batch in loader) == 960
    stored = sum(part.bytes for part in artifact.require().parts if part.details["content"] == "training")
    report = plan_report(plan)
    assert report["read_amplification"] == pytest.approx(loader.bytes_read / stored, rel=0.01)
    assert not [warning for warning in report["warnings"] if "reading" in warning]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batches.stratify=cluster"], "super_batch needs stratify: source or random"),
        (["batches.stratify=source", "batches.random_share=0.5"], "random_share"),
        (["batches.stratify=source", "batches.source_weights={a: 2}"], "source_weights"),
        (["batches.stratify=source", "cluster.surrogate=none"], "cluster.surrogate"),
    ],
)
@pytest.mark.parametrize("given", ["batches.super_batch=4", "batches.curriculum=[{steps: 3}, {super_batch: 4}]"])
def test_what_super_batches_cannot_do_is_refused(words: list[str], message: str, given: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, ["workspace=w", given, *words])
