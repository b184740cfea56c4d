"""The whole stage on Ray: no row is lost, rows of a cluster lie together in hash order, and re-running is safe."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.embedding import vectors
from clusterbatch.errors import UsageError
from clusterbatch.shards.reader import ROWS, ShardReader
from clusterbatch.shards.shuffle_map import AssignWorker
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace

SOURCES = {"forum": 1500, "wiki": 700, "tiny": 30}
SETTINGS = {"cluster": {"mean_size": 150, "run_rows": 16, "shard_bytes": 2**16, "workers": 2, "device": "cpu"}}


def text_rows(artifact: Artifact) -> pa.Table:
    """All rows of the shards' Parquet files, in shard order."""
    parts = [part for part in artifact.require().parts if part.details.get("content") == ROWS]
    parts.sort(key=lambda part: part.details["shard"])
    return pa.concat_tables([read_parquet(artifact.folder, part) for part in parts])


def all_runs(reader: ShardReader, vectors: bool = False) -> pa.Table:
    """Every row of every piece, in the order of the index."""
    index, batches = reader.index, []
    for entry in range(len(index)):
        runs = index.first_run[entry] + np.arange(-(-index.rows[entry] // index.run_rows))
        batches += reader.read_runs(int(index.shard[entry]), runs, vectors=vectors)
    return pa.Table.from_batches(batches)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory, ray_local):
    config = embedded_workspace(
        str(tmp_path_factory.mktemp("ws")), SOURCES, optional=["negatives", "weight"], settings=SETTINGS
    )
    return config, cluster(config), Workspace(config).clusters()


def test_every_row_is_written_once_beside_its_like(clustered) -> None:
    _, manifest, artifact = clustered
    total = sum(SOURCES.values())
    assert manifest.counts.read == manifest.counts.written == total
    reader = ShardReader(artifact)
    index = reader.index
    assert index.sources == sorted(SOURCES)
    assert index.total_rows == total
    assert len(np.unique(index.shard)) > 2
    rows = text_rows(artifact)
    assert sorted(rows["pair_id"].to_pylist()) == [f"{number:06d}" for number in range(total)]
    # The synthetic clusters are well apart: rows of one cluster name one word.
    runs = all_runs(reader, vectors=True)
    start = 0
    for entry in range(len(index)):
        piece = rows.slice(start, int(index.rows[entry]))
        start += len(piece)
        assert set(piece["source"].to_pylist()) == {index.sources[index.source[entry]]}
        assert len(set(piece["centroid"].to_pylist())) == 1
    assert runs.num_rows == total
    assert manifest.details["fit"]["forum"]["centroids"] == 10
    assert manifest.details["sources"]["tiny"]["clusters"] == 1


def test_training_columns_belong_to_their_rows(clustered) -> None:
    config, _, artifact = clustered
    runs, rows = all_runs(ShardReader(artifact), vectors=True), text_rows(artifact)
    corpus = Workspace(config).corpus
    given = pa.concat_tables([read_parquet(corpus.folder, part) for part in corpus.require().parts])
    place = {pair_id: row for row, pair_id in enumerate(given["pair_id"].to_pylist())}
    order = [place[pair_id] for pair_id in rows["pair_id"].to_pylist()]
    given = given.take(order)
    for name in ("query_hash", "document_hash", "weight"):
        assert runs[name].to_pylist() == given[name].to_pylist()
    negatives = [len(texts or []) for texts in given["negatives"].to_pylist()]
    assert [len(texts) for texts in runs["negative_tokens"].to_pylist()] == negatives
    assert len(set(map(len, runs["document_tokens"].to_pylist()))) == 5


def test_a_finished_stage_returns_at_once_and_another_configuration_is_refused(clustered) -> None:
    config, manifest, artifact = clustered
    assert cluster(config) == manifest
    other = config.model_copy(update={"cluster": config.cluster.model_copy(update={"seed": 5})})
    with pytest.raises(UsageError, match="another configuration"):
        cluster(other)
    assert not artifact.folder.exists("_exchange")


def test_the_result_does_not_depend_on_workers_or_order(clustered, tmp_path, in_process) -> None:
    """Two workers of Ray against this process, which does the units of every pass backwards."""
    _, manifest, _ = clustered
    config = embedded_workspace(str(tmp_path), SOURCES, optional=["negatives", "weight"], settings=SETTINGS)
    again = cluster(config)
    assert [part.checksum for part in again.parts] == [part.checksum for part in manifest.parts]


def test_passes_whose_tasks_were_cut_otherwise_are_made_anew(tmp_path, in_process, monkeypatch) -> None:
    """An earlier version had a task for each row group; it was interrupted when it had found communities by task."""
    pytest.importorskip("pymetis")
    settings = {"cluster": {**SETTINGS["cluster"], "method": "communities", "neighbour_ranks": [1, 9]}}
    runs = []
    for name in ("whole", "interrupted"):
        config = embedded_workspace(str(tmp_path / name), SOURCES, row_group_rows=32, settings=settings)
        with monkeypatch.context() as patch:
            if name == "interrupted":
                patch.setattr(vectors, "task_rows", lambda rows: 1)
                patch.setattr(AssignWorker, "process", _stop)
                with pytest.raises(KeyboardInterrupt):
                    cluster(config)
        cluster(config)
        runs.append(all_runs(ShardReader(Workspace(config).clusters()), vectors=True))
    assert runs[0].equals(runs[1])


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
