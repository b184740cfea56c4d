"""A bucket's rows: sorted however much text they have, few where texts are long, and split into parts of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.clustering.embedded_corpus import EmbeddedCorpus, PassFactory
from clusterbatch.clustering.model import StoredParts
from clusterbatch.config import ClusterConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.shards import shuffle_reduce as reducing
from clusterbatch.shards.bucket_plan import BucketPlan
from clusterbatch.shards.layout import ShardSchema
from clusterbatch.shards.passes import ShardPasses
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.shuffle_reduce import ReduceWorker, _columns, _sorted
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace
from tests.clustering.test_assign import unit
from tests.integration.test_cluster_stage import SETTINGS, SOURCES, text_rows

RANDOM = np.random.default_rng(3)


def _bucket(rows: int) -> pa.Table:
    """As the exchange gives it: in pieces, in no order."""
    table = pa.table(
        {
            "cluster": RANDOM.integers(0, 3, rows),
            "part": np.zeros(rows, np.int64),
            "hash": RANDOM.integers(0, 2**63, rows).astype(np.uint64),
            "pair_id": [f"{row:04d}" for row in range(rows)],
            "document": ["text " * (row % 40) for row in range(rows)],
            "negatives": pa.array(
                [None if row % 5 == 0 else ["one", "and another"][: row % 3] for row in range(rows)],
                pa.list_(pa.string()),
            ),
            "document_vector": vector_column(unit(rows, 4, 0).astype(np.float16)),
        }
    )
    return pa.concat_tables([table.slice(0, rows // 3), table.slice(rows // 3)])


def test_rows_are_sorted_in_pieces_that_the_offsets_of_text_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _bucket(600)
    expected = sorted(table.to_pylist(), key=lambda row: (row["cluster"], row["hash"]))
    whole = _sorted(_columns(table))
    assert whole.select(table.column_names).to_pylist() == expected
    assert whole["document"].num_chunks == 1
    monkeypatch.setattr(reducing, "_PIECE_BYTES", 4000)
    pieces = _sorted(_columns(_sorted(_columns(table))))
    assert pieces.select(table.column_names).to_pylist() == expected
    assert {name: pieces.schema.field(name).type for name in table.column_names} == dict(
        zip(table.column_names, table.schema.types, strict=True)
    )
    for name in ("document", "negatives"):
        assert pieces[name].num_chunks > 1
        assert max(chunk.nbytes for chunk in pieces[name].chunks) <= 4000


def test_sorting_holds_one_column_twice_and_no_more() -> None:
    vectors = {f"vector_{number}": vector_column(unit(9000, 64, number).astype(np.float16)) for number in range(8)}
    table = pa.table({"hash": RANDOM.permutation(9000).astype(np.uint64), **vectors})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table, max_chunksize=1000)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        # As from storage: every column of every piece can be freed alone.
        columns = _columns(pa.ipc.open_stream(sink.getvalue()).read_all())
        held = pool.bytes_allocated()
        assert held > 8 * 9000 * 64 * 2
        # The pool outlives what was allocated in it.
        hashes = _sorted(columns)["hash"].to_pylist()
        assert pool.max_memory() < 1.5 * held
    finally:
        pa.set_memory_pool(before)
    assert hashes == list(range(9000))


def test_rows_are_gathered_by_offsets_of_64_bits() -> None:
    """What `take` is given: a column of strings would be put together with offsets of 32 bits first."""
    kinds = [pa.string(), pa.list_(pa.string())]
    assert [reducing._wide(kind) for kind in kinds] == [pa.large_string(), pa.large_list(pa.large_string())]
    widened = reducing._widened(_bucket(30)).schema
    assert widened.field("document").type == pa.large_string()
    assert widened.field("hash").type == pa.uint64()


def test_shards_do_not_depend_on_the_pieces(tmp_path, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"cluster": {**SETTINGS["cluster"], "drop_outliers": 0.05, "max_size": 120}}
    found = []
    for name, piece_bytes in (("whole", reducing._PIECE_BYTES), ("pieces", 3000)):
        monkeypatch.setattr(reducing, "_PIECE_BYTES", piece_bytes)
        config = embedded_workspace(str(tmp_path / name), SOURCES, optional=["negatives"], settings=settings)
        cluster(config)
        artifact = Workspace(config).clusters()
        # Some cosines are NaN, which equals nothing.
        found.append((text_rows(artifact).drop_columns("cosine"), ShardReader(artifact).index.rows.tolist()))
    (whole, rows), (pieces, rows_of_pieces) = found
    assert pieces.equals(whole)
    assert pieces.schema.field("document").type == pa.string()
    assert rows_of_pieces == rows


def _planned(uri: Any, characters: float, *, vectors: bool = False, **mine: Any) -> tuple[BucketPlan, int]:
    """The plan for ten million rows of so many characters, which take a third of that on storage; and a row's bytes."""
    config = embedded_workspace(str(uri), {"forum": 300}, settings={"mine": mine})
    workspace, rows, dimensions = Workspace(config), 10_000_000, 16
    corpus, embeddings = workspace.corpus.require(), workspace.embeddings().require()
    each = round(characters / 3) + (4 * dimensions if vectors else 0)
    parts = [part.model_copy(update={"bytes": each * rows // len(corpus.parts)}) for part in corpus.parts]
    details = {"sources": {"forum": rows}, "dimensions": dimensions if vectors else None}
    counts = corpus.counts.model_copy(update={"written": rows, "read": rows})
    corpus = corpus.model_copy(update={"parts": parts, "counts": counts, "details": details})
    factory = PassFactory(workspace.clusters().folder.child("_exchange"), "identity", [])
    passes = ShardPasses(EmbeddedCorpus(config, 0, corpus, embeddings), factory)
    longest = 2 * (config.train.max_query_tokens + config.train.max_document_tokens)
    return passes.plan({}), min(1.5 * each, longest) + 4 * dimensions


@pytest.mark.parametrize(("characters", "negatives"), [(13_926, 0), (200_000, 0), (2000, 8)])
def test_a_bucket_has_a_gibibyte_of_text_at_most(tmp_path, characters: int, negatives: int) -> None:
    plan, _ = _planned(tmp_path, characters, negatives=negatives)
    assert 10_000_000 / plan.buckets * characters * (1 + negatives) <= 2**30


@pytest.mark.parametrize("vectors", [False, True])
def test_short_texts_have_the_buckets_that_their_tokens_want(tmp_path, vectors: bool) -> None:
    plan, each = _planned(tmp_path, 600, vectors=vectors)
    assert plan.buckets == np.ceil(10_000_000 * each / (1.25 * ClusterConfig().shard_bytes))


def test_fragments_of_a_cluster_in_several_buckets_are_never_one(tmp_path) -> None:
    """Three parts in the first bucket, two in the second."""
    plan = BucketPlan(np.array([0, 1]), np.array([0]), np.array([3]))
    artifact = Artifact(Folder(str(tmp_path)), "exchange")
    partitions, schema = Partitions(["a"], np.array([56]), np.array([1])), ShardSchema(1000, 16)
    worker = ReduceWorker(StoredParts(artifact, []), artifact, partitions, plan, schema, ClusterConfig(max_size=10))
    found = []
    for bucket, rows in enumerate((25, 20, 11)):
        table = _bucket(rows)
        table = table.set_column(0, "cluster", pa.array(np.zeros(rows, np.int64)))
        found += np.unique(worker._bounded(bucket, _sorted(_columns(table)))["part"].to_numpy()).tolist()
    assert len(set(found)) == len(found) == 3 + 2 + 2


def test_many_small_clusters_are_split_in_one_walk_over_the_rows(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of small clusters has tens of thousands: a look at all rows for each would take a minute."""
    plan = BucketPlan(np.array([0, 200]), np.zeros(200, np.int64), np.ones(200, np.int64))
    artifact = Artifact(Folder(str(tmp_path)), "exchange")
    partitions, schema = Partitions(["a"], np.array([3000]), np.array([1])), ShardSchema(1000, 16)
    worker = ReduceWorker(StoredParts(artifact, []), artifact, partitions, plan, schema, ClusterConfig(max_size=10))
    table = _bucket(3000)
    table = _sorted(_columns(table.set_column(0, "cluster", pa.array(RANDOM.integers(0, 200, 3000)))))
    flatnonzero, seen = np.flatnonzero, []

    def counted(values: np.ndarray) -> np.ndarray:
        seen.append(len(values))
        return flatnonzero(values)

    monkeypatch.setattr(np, "flatnonzero", counted)
    bounded = worker._bounded(0, table)
    assert sum(seen) <= 2 * 3000
    counts = bounded.group_by(["cluster", "part"]).aggregate([([], "count_all")])["count_all"].to_numpy()
    assert counts.max() == 10
    assert counts.sum() == 3000
