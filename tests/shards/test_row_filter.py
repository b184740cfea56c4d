"""`train.filter`: rows and hard negatives by their scores at training, from the same shards, with an exact plan."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.batches.negatives import NegativeChoice
from clusterbatch.batches.plan_report import left_out_sentences, plan_report
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.shards import row_filter
from clusterbatch.shards.index import KeptRows
from clusterbatch.shards.layout import PAIR_SCORES
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Folder, Part
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan
from tests.clustering.embedded import embedded_workspace
from tests.integration.test_cluster_stage import all_runs, text_rows

SOURCES = {"forum": 500, "wiki": 300}
COLUMNS = {"score": "score", "negatives": "negatives", "negative_scores": "negative_scores"}
SETTINGS = {
    "corpus": {"columns": COLUMNS},
    "cluster": {"mean_size": 60, "run_rows": 16, "device": "cpu", "shard_bytes": 2**16},
    "batches": {"size": 32},
    "train": {"encoder": "static"},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = str(tmp_path_factory.mktemp("filter"))
    return embedded_workspace(folder, SOURCES, optional=list(COLUMNS), settings=SETTINGS)


@pytest.fixture
def config(workspace: RunConfig, in_process: None) -> RunConfig:
    cluster(workspace)
    return workspace


def _given(config: RunConfig) -> dict[str, dict[str, Any]]:
    corpus = Workspace(config).corpus
    table = pa.concat_tables([read_parquet(corpus.folder, part) for part in corpus.require().parts])
    return {row["pair_id"]: row for row in table.to_pylist()}


def _plan(config: RunConfig, **changes: Any):
    config = with_changes(config, {f"train.filter.{key}": value for key, value in changes.items()})
    artifact = Workspace(config).clusters()
    return config, open_plan(config, artifact, artifact.require(), count_negatives=True)


def _names(config: RunConfig, plan: Any, step: int) -> list[str]:
    """Return the pair_ids of a batch."""
    rows = text_rows(Workspace(config).clusters())
    index, batch = plan.index, plan.batch(step)
    counts = rows.num_rows
    # In the text files shard after shard.
    shards = ShardReader(Workspace(config).clusters()).index
    ends = np.bincount(shards.shard, weights=shards.rows).astype(int)
    first = np.concatenate([[0], np.cumsum(ends)])
    place = first[index.shard[batch.piece]] + index.first_row[batch.piece] + batch.row
    assert place.max() < counts
    return rows["pair_id"].take(pa.array(place)).to_pylist()


def _kept_rows(kept: np.ndarray, rows: np.ndarray) -> KeptRows:
    """kept: of all pieces one after the other; they come in another order."""
    pieces = list(enumerate(np.split(kept, np.cumsum(rows)[:-1])))
    return KeptRows.of(iter(pieces[::-1]), rows)


def test_any_row_of_any_piece_is_found() -> None:
    random = np.random.default_rng(0)
    rows = random.integers(1, 900, 12)
    for share in (0.0, 0.02, 0.5, 1.0):
        kept = random.random(rows.sum()) < share
        table = _kept_rows(kept, rows)
        assert table.before[-1] == kept.sum()
        start = 0
        for piece, count in enumerate(rows.tolist()):
            wanted = np.flatnonzero(kept[start : start + count])
            found = table.rows(np.full(len(wanted), piece), np.arange(len(wanted)))
            assert found.tolist() == wanted.tolist()
            start += count


def test_the_table_of_kept_rows_is_made_in_few_bits_for_each_row() -> None:
    rows = np.full(1000, 1000)
    kept = np.random.default_rng(0).random(1000) < 0.5
    tracemalloc.start()
    KeptRows.of(((piece, kept) for piece in range(len(rows))), rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.sum() / 2


def test_scores_are_read_without_the_texts_between_them(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of texts are small: on object storage a request for each would fetch a megabyte for 32 KiB."""
    artifact = Workspace(config).clusters()
    manifest = artifact.require()
    read: list[Part] = []

    def counted(folder: Folder, part: Part, columns: list[str]) -> pa.Table:
        read.append(part)
        return read_parquet(folder, part, columns)

    monkeypatch.setattr(row_filter, "read_parquet", counted)
    _, plan = _plan(config, min_score=0.5, min_margin=0.1)
    assert {part.details["content"] for part in read} == {PAIR_SCORES}
    assert len(read) == len({part.path for part in read}) == manifest.details["shards"]
    assert all(part.details["row_groups"] == [part.rows] for part in read)
    # As clusters that an earlier version made.
    others = [part for part in manifest.parts if part.details.get("content") != PAIR_SCORES]
    earlier = manifest.model_copy(update={"parts": others})
    thresholds = with_changes(config, {"train.filter.min_score": 0.5, "train.filter.min_margin": 0.1}).train.filter
    index = row_filter.filter_rows(artifact, earlier, ShardReader(artifact).index, thresholds, negatives=True)
    assert (index.fingerprint, index.left_out) == (plan.index.fingerprint, plan.index.left_out)
    assert index.kept is not None
    assert plan.index.kept is not None
    assert np.array_equal(index.kept.bits, plan.index.kept.bits)


@pytest.mark.parametrize(
    ("stratify", "super_batch"),
    [("cluster", 1), ("source", 1), ("random", 1), ("random_groups", 1), ("source", 3), ("random", 3)],
)
def test_every_row_that_is_kept_comes_once_an_epoch(config: RunConfig, stratify: str, super_batch: int) -> None:
    given = _given(config)
    changed, plan = _plan(
        with_changes(config, {"batches.stratify": stratify, "batches.super_batch": super_batch}),
        min_score=0.6,
        sources={"wiki": {"min_score": 0.2}},
    )
    least = {"forum": np.float32(0.6), "wiki": np.float32(0.2)}
    kept = {
        name for name, row in given.items() if row["score"] is None or np.float32(row["score"]) >= least[row["source"]]
    }
    assert 0.3 * len(given) < len(kept) < 0.8 * len(given)
    for epoch in range(2):
        seen: list[str] = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            batch = plan.batch(step)
            names = _names(changed, plan, step)
            assert len(set(names)) == len(names) == 32
            seen += names[: len(names) - batch.repeated]
        assert sorted(seen) == sorted(kept)
    # A run that resumes makes its plan again.
    artifact = Workspace(changed).clusters()
    again = open_plan(changed, artifact, artifact.require())
    assert again.fingerprint == plan.fingerprint
    for step in (0, plan.steps_per_epoch + 1):
        for name in ("piece", "row"):
            assert getattr(again.batch(step), name).tolist() == getattr(plan.batch(step), name).tolist()


def test_no_stage_before_training_is_done_again(config: RunConfig) -> None:
    before = cluster(config)
    for least in (0.3, 0.6):
        changed, _ = _plan(config, min_score=least)
        assert cluster(changed) == before
    prints = {_plan(config, min_score=least)[1].fingerprint for least in (None, 0.3, 0.6)}
    assert len(prints) == 3
    # A threshold that leaves nothing out changes nothing.
    assert _plan(config, min_score=-5)[1].fingerprint == _plan(config)[1].fingerprint


def test_slices_of_any_number_of_ranks_are_the_rows_of_the_plan(config: RunConfig) -> None:
    changed, plan = _plan(config, min_score=0.5, min_margin=0.1)
    artifact = Workspace(changed).clusters()
    reader, negatives = ShardReader(artifact), NegativeChoice.of(changed.train, plan.index)
    rows = _given(changed)
    every = all_runs(reader)
    names = text_rows(artifact)["pair_id"].to_pylist()
    tokens = dict(zip(names, every["negative_tokens"].to_pylist(), strict=True))
    for step in range(0, plan.steps_per_epoch, 5):
        whole = _names(changed, plan, step)
        for size in (1, 2, 3):
            slices = [
                next(iter(SliceLoader(plan, reader, rank, size, step, step + 1, negatives=negatives)))
                for rank in range(size)
            ]
            hashes = np.concatenate([each.query_hash for each in slices]).tolist()
            assert hashes == [rows[name]["query_hash"] for name in whole]
            counts = np.concatenate([each.negative_counts for each in slices]).tolist()
            found = [list(text) for each in slices for text in each.negative_tokens]
            wanted = []
            for name, count in zip(whole, counts, strict=True):
                row = rows[name]
                scores = row["negative_scores"] or []
                far = [
                    row["score"] is None or np.float32(row["score"]) - np.float32(score) >= np.float32(0.1)
                    for score in scores
                ]
                assert sum(far) == count
                wanted += [text for text, is_far in zip(tokens[name], far, strict=True) if is_far]
            assert found == wanted


def test_what_is_left_out_is_counted_by_source(config: RunConfig) -> None:
    given = _given(config).values()
    _, plan = _plan(config, min_score=0.5, min_margin=0.2)
    report = plan_report(plan)["filtered"]
    for source in SOURCES:
        rows = [row for row in given if row["source"] == source]
        low = [row for row in rows if row["score"] is not None and np.float32(row["score"]) < np.float32(0.5)]
        left = [row for row in rows if row not in low]
        margins = [
            np.float32(np.nan if row["score"] is None else row["score"]) - np.float32(score)
            for row in left
            for score in row["negative_scores"] or []
        ]
        assert report[source] == {
            "rows": len(rows),
            "rows_left_out": len(low),
            "rows_without_score": sum(row["score"] is None for row in rows),
            "negatives": len(margins),
            "negatives_left_out": sum(bool(margin < np.float32(0.2)) for margin in margins),
            "negatives_without_score": int(np.isnan(margins).sum()),
        }
        sentence = next(text for text in left_out_sentences(report) if text.endswith(f" of {source}"))
        assert f"{len(low):,} of {len(rows):,} pairs" in sentence
    assert "filtered" not in plan_report(_plan(config)[1])


def test_thresholds_that_cannot_be_met_are_one_line(config: RunConfig) -> None:
    for changes, message in (
        ({"min_score": 7}, r"train\.filter: no pair of wiki scores 7\.0 or more"),
        ({"sources": {"wikki": {"min_score": 0.1}}}, r"train\.filter\.sources\.wikki: the shards have no such source"),
    ):
        with pytest.raises(UsageError, match=message):
            _plan(config, **changes)


def test_a_source_of_which_nothing_is_left_may_be_left_out(config: RunConfig) -> None:
    """As the refusal advises."""
    thresholds = {"sources": {"wiki": {"min_score": 7}}}
    with pytest.raises(UsageError, match=r"batches\.source_weights\.wiki=0 leaves a source out"):
        _plan(config, **thresholds)
    _, plan = _plan(with_changes(config, {"batches.source_weights": {"wiki": 0}}), **thresholds)
    assert plan.left_out == ["wiki"]
    rows = {name for step in range(plan.steps_per_epoch) for name in _names(config, plan, step)}
    assert rows == {name for name, row in _given(config).items() if row["source"] == "forum"}
    # That another one is left out is no help.
    with pytest.raises(UsageError, match="no pair of wiki scores"):
        _plan(with_changes(config, {"batches.source_weights": {"forum": 0}}), **thresholds)


def test_shards_without_scores_are_refused(tmp_path: Path, in_process: None) -> None:
    config = embedded_workspace(str(tmp_path), {"forum": 100}, settings=SETTINGS)
    cluster(config)
    with pytest.raises(UsageError, match=r"train\.filter\.min_score: .* was made without corpus\.columns\.score"):
        _plan(config, min_score=0.5)
