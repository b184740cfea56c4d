"""Corpora in which a few documents or queries stand in very many rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.batches.plan import BatchPlan, GlobalBatch
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.batches.strata import POOL
from clusterbatch.config import BatchesConfig
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.layout import ShardSchema
from clusterbatch.shards.reader import INDEX, ShardReader, index_table
from clusterbatch.shards.writer import ShardWriter
from clusterbatch.store import Artifact, Counts, Folder, Receipt
from clusterbatch.store.tables import write_parquet
from tests.batches.indexes import make_index, row_ids

# Of 24 clusters of 128 rows, clusters 3 and 4 have one document each, the others no document twice.
CROWDED = (3, 4)


def _index(sizes: list[list[int]], crowded: dict[tuple[int, int], float], pieces: int = 1) -> ClusterIndex:
    index = make_index(sizes, pieces=pieces)
    keys = zip(index.source.tolist(), index.cluster.tolist(), strict=True)
    return replace(index, crowding=np.array([crowded.get(key, 0.0) for key in keys], np.float32))


def _copies(batch: GlobalBatch, crowded: tuple[int, ...]) -> float:
    """The share of (query, document) pairs of different rows that are copies of the positive."""
    counts = np.array([np.count_nonzero(batch.cluster == number) for number in crowded])
    return float((counts * (counts - 1)).sum() / (len(batch) * (len(batch) - 1)))


def test_a_document_that_fills_clusters_does_not_fill_batches() -> None:
    index = _index([[128] * 24], dict.fromkeys([(0, number) for number in CROWDED], 1.0))
    config = BatchesConfig(size=64, clusters_per_batch=1)
    before = BatchPlan(replace(index, crowding=np.empty(0, np.float32)), config)
    assert max(_copies(before.batch(step), CROWDED) for step in range(before.steps_per_epoch)) == 1.0
    plan = BatchPlan(index, config)
    batches = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    assert max(_copies(batch, CROWDED) for batch in batches) < 0.5
    # Only the neighbours of the crowded clusters are mixed with them, with about as many rows.
    mixed = [batch for batch in batches if np.isin(batch.cluster, CROWDED).any()]
    assert set(np.concatenate([batch.cluster for batch in mixed]).tolist()) <= {1, 2, 3, 4, 5, 6}
    pure = [batch.purity for batch in batches if not np.isin(batch.cluster, CROWDED).any()]
    assert np.mean(pure) == 1.0
    report = plan_report(plan)
    assert report["mixed"] == ["source-0"]
    assert any(warning.startswith("repeats: clusters of source-0") for warning in report["warnings"])


def test_a_source_of_six_documents_spreads_them_evenly() -> None:
    """Six documents in 128 rows each: as in labelled data whose documents are the names of classes."""
    index = _index([[128] * 6], {(0, number): 1.0 for number in range(6)})
    plan = BatchPlan(index, BatchesConfig(size=64))
    batches = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    assert max(_copies(batch, tuple(range(6))) for batch in batches) < 0.4
    seen = np.concatenate([row_ids(index, batch.piece, batch.row) for batch in batches])
    assert len(np.unique(seen)) == 768


def test_what_no_mixing_can_help_is_said_before_training() -> None:
    plan = BatchPlan(_index([[640], [640, 640]], {(0, 0): 1.0}), BatchesConfig(size=64))
    warnings = plan_report(plan)["warnings"]
    assert any("100% of the negatives in batches of source-0" in warning for warning in warnings), warnings
    alone = _index([[640]], {(0, 0): 1.0})
    random = BatchPlan(alone, BatchesConfig(size=64, stratify="random"))
    assert any("100% of the negatives" in warning for warning in plan_report(random)["warnings"])


def test_indexes_without_repeats_make_the_plans_they_always_made() -> None:
    index = make_index([[200, 100, 40]])
    config = BatchesConfig(size=32)
    plan = BatchPlan(index, config)
    for other in (_index([[200, 100, 40]], {}), _index([[200, 100, 40]], {(0, 1): 0.3})):
        assert BatchPlan(other, config).fingerprint == plan.fingerprint
        for step in range(plan.steps_per_epoch):
            assert np.array_equal(BatchPlan(other, config).batch(step).row, plan.batch(step).row)
    crowded = _index([[200, 100, 40]], {(0, 1): 0.9})
    assert BatchPlan(crowded, config).fingerprint != plan.fingerprint


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=8), min_size=1, max_size=3),
    size=st.sampled_from([8, 24, 32]),
    pieces=st.integers(1, 3),
    uniform=st.booleans(),
    small=st.sampled_from(["pool", "leave_out"]),
    data=st.data(),
)
def test_every_row_still_comes_and_none_twice_in_a_batch(
    sizes: list[list[int]], size: int, pieces: int, uniform: bool, small: str, data: st.DataObject
) -> None:
    sizes[0].append(size)
    keys = [(source, cluster) for source, of_source in enumerate(sizes) for cluster in range(len(of_source))]
    crowded = data.draw(st.dictionaries(st.sampled_from(keys), st.sampled_from([0.2, 0.7, 1.0])))
    index = _index(sizes, crowded, pieces)
    config = BatchesConfig(size=size, small_sources=small, uniform_clusters=uniform, clusters_per_batch=1)
    plan = BatchPlan(index, config)
    assert all(stratum.rows >= size or stratum.name == POOL for stratum in plan.strata)
    batches = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    for batch in batches:
        assert len(np.unique(row_ids(index, batch.piece, batch.row))) == len(batch) == size
    if not uniform:
        seen = np.concatenate([row_ids(index, batch.piece, batch.row) for batch in batches])
        left_out = [number for number, name in enumerate(index.sources) if name in plan.left_out]
        kept = int(index.rows[~np.isin(index.source, left_out)].sum())
        assert len(np.unique(seen)) == kept
    report = plan_report(plan)
    assert report["rows"] == sum(stratum.rows for stratum in plan.strata)
    assert sum(each["rows"] for each in report["sources"].values()) == report["rows"]


@pytest.mark.parametrize("side", ["query", "document"])
def test_shards_tell_the_plan_which_texts_repeat(tmp_path: Path, side: str) -> None:
    artifact = _shards(tmp_path, side)
    reader = ShardReader(artifact)
    assert reader.index.crowding.tolist() == [1.0, 0.0, 1.0, 0.0]
    plan = BatchPlan(reader.index, BatchesConfig(size=32))
    for batch in SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch):
        hashes = batch.query_hash if side == "query" else batch.document_hash
        assert np.unique(hashes, return_counts=True)[1].max() < 0.75 * len(batch)


def _shards(folder: Path, side: str) -> Artifact:
    """Four clusters of 64 rows in one shard; the first and the third have the same text in every row."""
    layout = ShardSchema(vocabulary=100, run_rows=8)
    artifact = Artifact(Folder(str(folder)), "clusters")
    writer = ShardWriter(layout)
    for cluster in range(4):
        own = np.arange(64, dtype=np.uint64) + np.uint64(1000 * cluster)
        same = np.full(64, 1000 * cluster, np.uint64)
        hashes = {f"{name}_hash": same if name == side and cluster % 2 == 0 else own for name in ("query", "document")}
        tokens = pa.array([[1, 2]] * 64, layout.training.field("query_tokens").type)
        table = pa.table({"query_tokens": tokens, "document_tokens": tokens, **hashes})
        text = pa.table({"pair_id": [f"{cluster}-{row}" for row in range(64)]})
        writer.add(table, text, source="one", cluster=cluster, piece=0, mean_cosine=0.5)
    parts = writer.write(artifact, "shard", shard=0)
    pieces = [{**piece, "shard": 0} for piece in writer.pieces]
    index = write_parquet(artifact, "index", index_table(pieces), content=INDEX)
    artifact.commit(
        "clusters",
        [Receipt(unit=0, fingerprint="clusters", parts=parts, counts=Counts(read=256, written=256))],
        config={"stratify": "cluster"},
        inputs={},
        seconds=0.0,
        details={"layout": layout.__dict__},
        extra_parts=[index],
    )
    return artifact
