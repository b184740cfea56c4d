"""Communities in place of clusters through the whole stage, and the batches that they make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.clustering import communities
from clusterbatch.clustering.communities_fit import CommunitiesWorker
from clusterbatch.config import RunConfig, load_config
from clusterbatch.embedding.vectors import vector_values
from clusterbatch.errors import UsageError
from clusterbatch.experiments.compare.arms import arms_of
from clusterbatch.pipeline.refresh import refresh
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search import gather as gathering
from clusterbatch.search.neighbours import GroupKeys, neighbours
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Manifest, shuffle
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan
from tests.clustering.embedded import embedded_workspace
from tests.in_process import run_in_process
from tests.integration.test_cluster_stage import text_rows

SOURCES = {"forum": 500, "wiki": 192, "tiny": 12}
TOTAL = sum(SOURCES.values())
SIZE = 32


def run(uri: Any, **changes: Any) -> tuple[RunConfig, Manifest]:
    pytest.importorskip("pymetis")
    settings = {
        "cluster": {
            "method": "communities",
            "mean_size": SIZE,
            "run_rows": SIZE,
            "neighbour_ranks": [2, 22],
            "shard_bytes": 2**16,
            "device": "cpu",
            **changes,
        },
        "batches": {"size": 4 * SIZE},
    }
    config = embedded_workspace(str(uri), SOURCES, spread=0.5, settings=settings)
    return config, cluster(config)


@pytest.fixture
def made(tmp_path, monkeypatch) -> tuple[RunConfig, Manifest]:
    run_in_process(monkeypatch)
    return run(tmp_path / "made")


def test_every_row_is_in_one_community_of_its_source(made) -> None:
    config, manifest = made
    assert manifest.counts.read == manifest.counts.written == TOTAL
    artifact = Workspace(config).clusters()
    rows = text_rows(artifact)
    assert sorted(rows["pair_id"].to_pylist()) == [f"{number:06d}" for number in range(TOTAL)]
    index = ShardReader(artifact).index
    for number, source in enumerate(index.sources):
        of_source = index.source == number
        sizes = np.bincount(index.cluster[of_source], index.rows[of_source]).astype(int)
        assert sizes.sum() == SOURCES[source]
        assert sorted(sizes)[1:] == [SIZE] * (len(sizes) - 1)
    assert manifest.details["fit"]["forum"]["centroids"] == -(-SOURCES["forum"] // SIZE)


def test_the_rows_that_stand_together_are_those_of_the_graph(made) -> None:
    """Against search and cut of each source at once, from the corpus as it lies there."""
    config, _ = made
    workspace = Workspace(config)
    corpus, vectors = (
        pa.concat_tables([read_parquet(artifact.folder, part) for part in artifact.require().parts])
        for artifact in (workspace.corpus, workspace.embeddings())
    )
    shards = text_rows(workspace.clusters())
    for source in ("forum", "wiki"):
        here = pa.array(np.flatnonzero(corpus["source"].to_numpy() == source))
        rows = corpus.take(here)
        query, document = (vector_values(vectors[f"{side}_vector"].take(here)) for side in ("query", "document"))
        hashes = [rows[f"{side}_hash"].to_numpy() for side in ("query", "document")]
        found = neighbours(query, hashes[0], document, [document], GroupKeys(*hashes), 22).ranking.documents[:, 2:]
        expected = _sets(rows["pair_id"].to_pylist(), communities.communities(found, SIZE, config.cluster.seed))
        written = shards.filter(pa.compute.equal(shards["source"], source))
        assert _sets(written["pair_id"].to_pylist(), written["centroid"].to_numpy()) == expected


def _sets(names: list[str], label: np.ndarray) -> set[frozenset[str]]:
    members: dict[int, list[str]] = {}
    for name, number in zip(names, label.tolist(), strict=True):
        members.setdefault(number, []).append(name)
    return {frozenset(of_one) for of_one in members.values()}


def test_the_result_does_not_depend_on_blocks_workers_or_order(made, tmp_path, monkeypatch, in_process) -> None:
    """Units backwards, each with few queries, against units in order with many."""
    monkeypatch.setattr(gathering, "_BLOCK_ROWS", 100)
    _, again = run(tmp_path / "again")
    assert [part.checksum for part in again.parts] == [part.checksum for part in made[1].parts]


def test_an_interrupted_stage_goes_on_to_the_same_result(tmp_path, monkeypatch, in_process) -> None:
    # An item for each source.
    monkeypatch.setattr(shuffle, "_LEAST_BYTES", 0)
    _, undisturbed = run(tmp_path / "undisturbed")
    original, partitions = CommunitiesWorker.process, []

    def dies(worker: CommunitiesWorker, item: WorkItem, output: Artifact) -> Result:
        partitions.append(item.number)
        if len(partitions) == 2:
            raise KeyboardInterrupt
        return original(worker, item, output)

    monkeypatch.setattr(CommunitiesWorker, "process", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    _, again = run(tmp_path / "killed", workers=1)
    assert [part.checksum for part in again.parts] == [part.checksum for part in undisturbed.parts]
    assert len(partitions) == 3
    assert partitions[1] == partitions[2] != partitions[0]


def test_a_batch_is_made_of_several_whole_communities_of_one_source(made) -> None:
    config, manifest = made
    plan = open_plan(config, Workspace(config).clusters(), manifest)
    index = plan.index
    first = np.concatenate([[0], np.cumsum(index.rows)])
    seen = np.zeros(TOTAL, int)
    whole, batches = 0, set()
    for step in range(plan.steps_per_epoch):
        batch = plan.batch(step)
        seen[first[batch.piece] + batch.row] += 1
        assert len(set(index.source[batch.piece])) == 1 or batch.stratum.name.startswith("(")
        _, taken = np.unique(index.cluster[batch.piece], return_counts=True)
        whole += int((taken == SIZE).all())
        batches.add(frozenset(index.cluster[batch.piece]))
    assert seen.min() == 1
    assert whole >= SOURCES["forum"] // (4 * SIZE) + SOURCES["wiki"] // (4 * SIZE)
    # Which ones meet is drawn anew in every epoch.
    other = {frozenset(index.cluster[plan.batch(plan.steps_per_epoch + step).piece]) for step in range(3)}
    assert not other <= batches


def test_a_share_of_the_rows_may_be_left_out_as_outliers(tmp_path, monkeypatch) -> None:
    run_in_process(monkeypatch)
    _, manifest = run(tmp_path, drop_outliers=0.1)
    assert manifest.counts.set_aside["outlier"] == pytest.approx(0.1 * TOTAL, abs=3)
    assert manifest.counts.written + manifest.counts.set_aside["outlier"] == TOTAL


def test_what_cannot_work_is_one_line(tmp_path, monkeypatch) -> None:
    words = [f"workspace={tmp_path}", "cluster.method=communities"]
    with pytest.raises(UsageError, match="refresh continues from centroids"):
        refresh(load_config(None, words))
    for key in ("column=group", "levels=2", "dimensions=8", "balanced=true"):
        with pytest.raises(UsageError, match="method: communities has no use for"):
            load_config(None, [*words, f"cluster.{key}"])
    with pytest.raises(UsageError, match="neighbour_ranks"):
        load_config(None, [*words, "cluster.neighbour_ranks=[5,5]"])
    monkeypatch.setattr(communities.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'clusterbatch\[communities\]'"):
        cluster(load_config(None, words))


def test_the_arm_fills_batches_with_communities() -> None:
    config = load_config(None, ["workspace=/none", "compare.arms=[random,cluster,communities]", "batches.size=256"])
    arms, layouts = arms_of(config)
    by_name = {arm.name: arm for arm in arms}
    assert by_name["communities"].layout != by_name["cluster"].layout == by_name["random"].layout
    cluster_config = layouts[by_name["communities"].layout].cluster
    assert cluster_config.method == "communities"
    assert cluster_config.mean_size == cluster_config.run_rows
    assert by_name["communities"].uses_clusters
