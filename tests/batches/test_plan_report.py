from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.batches import plan as plan_module
from clusterbatch.batches import plan_report as plan_report_module
from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.batches.sequence import EpochSequence
from clusterbatch.batches.strata import POOL, Stratum
from clusterbatch.config import BatchesConfig
from tests.batches.indexes import make_index


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=10), min_size=1, max_size=4),
    size=st.sampled_from([8, 24, 32, 50]),
    run_rows=st.sampled_from([1, 4, 8]),
    clusters_per_batch=st.sampled_from([None, 1, 2]),
    pieces=st.integers(1, 3),
    epochs=st.integers(1, 2),
)
def test_figures_are_those_of_a_walk_through_all_batches(
    sizes: list[list[int]], size: int, run_rows: int, clusters_per_batch: int | None, pieces: int, epochs: int
) -> None:
    sizes[0].append(size)
    index = make_index(sizes, run_rows=run_rows, pieces=pieces)
    plan = BatchPlan(index, BatchesConfig(size=size, clusters_per_batch=clusters_per_batch))
    report = plan_report(plan, epochs)
    purity, packed, repeats, fetched = defaultdict(list), defaultdict(list), defaultdict(int), defaultdict(int)
    for batch in map(plan.batch, range(epochs * plan.steps_per_epoch)):
        name = batch.stratum.name
        purity[name].append(batch.purity)
        packed[name].append(batch.packed.mean())
        repeats[name] += batch.repeated
        runs = {(piece, row // run_rows) for piece, row in zip(batch.piece.tolist(), batch.row.tolist(), strict=True)}
        fetched[name] += sum(min(run_rows, int(index.rows[piece]) - run * run_rows) for piece, run in runs)
    assert set(report["sources"]) == set(purity)
    for name, each in report["sources"].items():
        assert each["batches"] * epochs == len(purity[name])
        assert each["purity"] == pytest.approx(np.mean(purity[name]))
        assert each["packed_share"] == pytest.approx(np.mean(packed[name]))
        assert each["repeats"] * epochs == repeats[name]
        used = len(purity[name]) * size
        # Runs that two stretches of one batch share by chance, or that a last batch and its filling share, count twice.
        assert fetched[name] / used <= each["read_amplification"] + 1e-9
        assert each["read_amplification"] <= fetched[name] / used * 2
    everything = [value for values in purity.values() for value in values]
    assert report["purity"] == pytest.approx(np.mean(everything))
    assert report["repeats"] * epochs == sum(repeats.values())


def test_of_many_sources_some_stand_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one 100,000 would take minutes, and their orders a gigabyte."""
    random = np.random.default_rng(0)
    index = make_index([random.integers(10, 90, 12).tolist() for _ in range(60)])
    config = BatchesConfig(size=32, clusters_per_batch=1)
    whole = plan_report(BatchPlan(index, config))
    walked: list[int] = []
    sequence = BatchPlan.sequence

    def counted(self: BatchPlan, stratum: Stratum, epoch: int) -> EpochSequence:
        walked.append(stratum.number)
        return sequence(self, stratum, epoch)

    monkeypatch.setattr(BatchPlan, "sequence", counted)
    monkeypatch.setattr(plan_report_module, "_SAMPLED_STRATA", 16)
    monkeypatch.setattr(plan_module, "_KEPT_SEQUENCES", 5)
    plan = BatchPlan(index, config)
    found = plan_report(plan)
    assert len(set(walked)) == 15
    assert len(plan._sequences) == 5
    assert found.keys() == whole.keys()
    assert found["sources"].keys() == whole["sources"].keys()
    for name, each in whole["sources"].items():
        for key in ("rows", "clusters", "batches", "batches_per_epoch", "clusters_per_batch", "leftovers", "repeats"):
            assert found["sources"][name][key] == each[key]
    for key in ("purity", "packed_share", "read_amplification"):
        assert found[key] == pytest.approx(whole[key], rel=0.1)


def test_reading_is_predicted_exactly_where_batches_are_of_whole_runs() -> None:
    index = make_index([np.random.default_rng(0).integers(50, 400, 40).tolist()], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=64, clusters_per_batch=1))
    fetched = 0
    for batch in map(plan.batch, range(plan.steps_per_epoch)):
        runs = np.unique(np.stack([batch.piece, batch.row // 8]), axis=1)
        fetched += int(np.minimum(8, index.rows[runs[0]] - runs[1] * 8).sum())
    predicted = plan_report(plan)["read_amplification"]
    assert predicted == pytest.approx(fetched / (plan.steps_per_epoch * 64), rel=0.005)
    assert predicted < 1.05


def test_single_rows_are_predicted_to_read_whole_runs() -> None:
    index = make_index([[400] * 10], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=64, stratify="random"), layout="cluster")
    fetched = [
        8 * len(set(zip(batch.piece.tolist(), (batch.row // 8).tolist(), strict=True))) / 64
        for batch in map(plan.batch, range(plan.steps_per_epoch))
    ]
    report = plan_report(plan)
    assert report["read_amplification"] == pytest.approx(np.mean(fetched), rel=0.05)
    assert report["sources"]["(all)"]["purity"] is None
    assert report["purity"] == pytest.approx(np.mean([plan.batch(s).purity for s in range(63)]), rel=0.1)
    assert any("moves single rows" in warning for warning in report["warnings"])


def test_pooled_and_left_out_sources_are_named() -> None:
    index = make_index([[20], [30], [500]], run_rows=8)
    pooled = plan_report(BatchPlan(index, BatchesConfig(size=64)))
    assert pooled["pooled"] == ["source-0", "source-1"]
    assert set(pooled["sources"]) == {"source-2", POOL}
    assert any("source-0, source-1" in warning for warning in pooled["warnings"])
    left = plan_report(BatchPlan(index, BatchesConfig(size=64, small_sources="leave_out")))
    assert left["left_out"] == ["source-0", "source-1"]
    assert left["rows"] == 500
    assert any(warning.startswith("left out") for warning in left["warnings"])


@pytest.mark.parametrize(
    ("clusters", "config", "words"),
    [
        ([100] * 40, {"size": 64, "clusters_per_batch": 1}, "packing:"),
        ([70] * 40, {"size": 64, "clusters_per_batch": 1}, "hardly larger"),
        ([100] * 40, {"size": 64}, "batches.clusters_per_batch"),
        ([1000] * 4, {"size": 20}, "reading:"),
    ],
)
def test_what_to_mind_is_said(clusters: list[int], config: dict[str, int], words: str) -> None:
    report = plan_report(BatchPlan(make_index([clusters]), BatchesConfig(**config)))
    assert any(words in warning for warning in report["warnings"]), report["warnings"]


def test_a_good_plan_gives_no_warning() -> None:
    report = plan_report(BatchPlan(make_index([[1000, 900, 1200, 1100]] * 3), BatchesConfig(size=64)))
    assert report["warnings"] == []
    assert report["purity"] > 0.9
    assert report["packed_share"] < 0.1


def test_purity_is_that_of_the_clusters_however_many_count_as_one_group() -> None:
    plan = BatchPlan(make_index([[320] * 8]), BatchesConfig(size=64, merged_clusters=4, clusters_per_batch=1))
    walked = [plan.batch(step).purity for step in range(plan.steps_per_epoch)]
    assert max(walked) < 0.8
    report = plan_report(plan)
    assert report["purity"] == pytest.approx(np.mean(walked))
    assert report["sources"]["source-0"]["purity"] is None


@pytest.mark.parametrize("size", [64, 256])
def test_batches_of_whole_runs_are_not_told_to_be_so(size: int) -> None:
    """Small clusters end in many short runs, so more is read than is used whatever the size of the batch."""
    plan = BatchPlan(make_index([[30, 50, 20] * 40], run_rows=64), BatchesConfig(size=size))
    report = plan_report(plan)
    assert report["read_amplification"] > 1.1
    assert not any("batches.size should be" in warning for warning in report["warnings"]), report["warnings"]


def test_a_source_with_a_stratum_for_each_cluster_is_described_as_one() -> None:
    index = make_index([[640, 64, 20, 30], [320, 128, 10]], run_rows=8)
    plan = BatchPlan(index, BatchesConfig(size=32, uniform_clusters=True, clusters_per_batch=1))
    assert len(plan.strata) > 2
    report = plan_report(plan)
    assert set(report["sources"]) == {"source-0", "source-1"}
    assert sum(each["rows"] for each in report["sources"].values()) == report["rows"] == index.total_rows
    assert report["sources"]["source-0"]["clusters"] == 4
    for name in ("leftovers", "repeats"):
        assert report[name] == sum(each[name] for each in report["sources"].values())
    walked = [plan.batch(step).purity for step in range(12 * plan.steps_per_epoch)]
    assert report["purity"] == pytest.approx(np.mean(walked), rel=0.05)
