"""Each way to cluster through the whole stage: rows are conserved, and each promise of the option holds.

They run their units in this process, one after the other: what the workers do is the same, and Ray's starts are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from clusterbatch.clustering import fit_distributed as distributed
from clusterbatch.clustering.model import StoredParts, read_fits, stored_fits
from clusterbatch.clustering.warm_start import stored_levels
from clusterbatch.config import RunConfig
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.embedder import UnitEmbedder
from clusterbatch.embedding.vectors import SIDES
from clusterbatch.embedding.workers import embeddings_table
from clusterbatch.errors import UsageError
from clusterbatch.runtime import InProcessExecutor, executor
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.shards.statistics import inspect_cluster, inspect_source
from clusterbatch.store import Manifest
from clusterbatch.store.artifact import MANIFEST
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace
from tests.clustering import embedded
from tests.clustering.embedded import blobs, embedded_workspace
from tests.integration.test_cluster_stage import SETTINGS, SOURCES, all_runs, text_rows

TOTAL = sum(SOURCES.values())


def run(
    uri: Any, *, optional: Sequence[str] = (), weightless: Sequence[str] = (), **cluster_settings: Any
) -> tuple[RunConfig, Manifest]:
    settings = {"cluster": {**SETTINGS["cluster"], **cluster_settings}}
    config = embedded_workspace(str(uri), SOURCES, optional=optional, weightless=weightless, settings=settings)
    return config, cluster(config)


def sizes(config: RunConfig) -> dict[str, list[int]]:
    """Rows of each cluster by source."""
    index = ShardReader(Workspace(config).clusters()).index
    found: dict[str, list[int]] = {}
    for number, source in enumerate(index.sources):
        of_source = index.source == number
        found[source] = np.bincount(index.cluster[of_source], index.rows[of_source]).astype(int).tolist()
    return found


def test_bounds_hold_exactly_and_reduced_vectors_keep_their_error(tmp_path, in_process) -> None:
    config, manifest = run(tmp_path, features="both_orders", dimensions=12, min_size=60, max_size=130, surrogate="int8")
    assert manifest.counts.written == TOTAL
    for source, rows in sizes(config).items():
        assert max(rows) <= 130
        # Parts of a split cluster are about equal, so none of them is tiny either.
        assert source == "tiny" or min(rows) >= 60
    assert 0 < manifest.details["surrogate_cosine_error"] < 0.02
    runs = all_runs(ShardReader(Workspace(config).clusters()), vectors=True)
    norms = [np.linalg.norm(vector) for vector in runs["query_vector"].to_pylist()[:50]]
    np.testing.assert_allclose(norms, 1, atol=0.03)


def test_outliers_are_kept_aside_with_their_scores(tmp_path, in_process) -> None:
    config, manifest = run(tmp_path, drop_outliers=0.1)
    aside = manifest.counts.set_aside["outlier"]
    assert manifest.counts.written == TOTAL - aside
    assert 0.04 * TOTAL < aside < 0.2 * TOTAL
    artifact = Workspace(config).clusters()
    parts = [part for part in manifest.parts if part.details.get("content") == "outliers"]
    rows = [row for part in parts for row in read_parquet(artifact.folder, part).to_pylist()]
    kept = text_rows(artifact)
    assert len(rows) == aside
    assert not {row["pair_id"] for row in rows} & set(kept["pair_id"].to_pylist())
    cosine = np.array(kept["cosine"].to_pylist())
    assert max(row["cosine"] for row in rows) < np.nanmedian(cosine)


def test_two_levels_find_the_same_kind_of_clusters(tmp_path, in_process) -> None:
    config, manifest = run(tmp_path, levels=2, mean_size=100)
    assert manifest.details["fit"]["forum"]["centroids"] == 15
    assert manifest.counts.written == TOTAL
    assert len(sizes(config)["forum"]) >= 12
    rows = text_rows(Workspace(config).clusters())
    assert min(row["mean_cosine"] for row in inspect_source(config, "forum")) > 0.7
    assert rows.num_rows == TOTAL


def test_two_levels_where_nearly_all_documents_repeat(tmp_path, in_process, monkeypatch) -> None:
    # Three vectors for more coarse centroids: nobody chooses some of those.
    monkeypatch.setattr(embedded, "blobs", partial(blobs, spread=0.0))
    settings = {"cluster": {**SETTINGS["cluster"], "levels": 2, "mean_size": 20}}
    config = embedded_workspace(str(tmp_path), {"forum": 1200}, centres=3, settings=settings)
    manifest = cluster(config)
    assert manifest.counts.written == 1200
    rows = text_rows(Workspace(config).clusters())
    assert len(set(rows["pair_id"].to_pylist())) == 1200
    assert min(rows["cosine"].to_pylist()) > 0.999
    assert manifest.details["fit"]["forum"]["mean_cosine"] > 0.999


@pytest.mark.parametrize("levels", [1, 2])
def test_a_source_whose_rows_have_no_weight_is_clustered_as_any_other(tmp_path, in_process, levels) -> None:
    settings = {"levels": levels, "drop_outliers": 0.05}
    plain, _ = run(tmp_path / "plain", **settings)
    weightless, manifest = run(tmp_path / "weightless", optional=["weight"], weightless=["forum", "tiny"], **settings)
    assert manifest.counts.written + manifest.counts.set_aside["outlier"] == TOTAL
    assert sizes(weightless)["forum"] == sizes(plain)["forum"]
    if levels == 1:
        # Rows, not their weights: shards are planned by these. All rows of a source so small are in its sample.
        [level] = stored_levels(StoredParts(Workspace(weightless).clusters(), manifest.parts))
        fits = {details["group"]: table for details, table in read_fits(level, stored_fits(level.parts))}
        assert {name: table["sampled"].to_numpy().sum() for name, table in fits.items()} == {
            name: SOURCES[name] for name in ("forum", "wiki")
        }


def test_the_users_own_clusters(tmp_path, in_process) -> None:
    config, manifest = run(tmp_path, optional=["group"], column="group")
    assert {source: len(rows) for source, rows in sizes(config).items()} == {"forum": 3, "wiki": 3, "tiny": 3}
    assert manifest.counts.written == TOTAL
    assert manifest.config["stratify"] == "group"


def test_rows_of_one_document_of_a_source_share_a_hash(tmp_path, in_process) -> None:
    config, manifest = run(tmp_path, optional=["document_id"])
    assert manifest.counts.written == TOTAL
    artifact = Workspace(config).clusters()
    hashes = all_runs(ShardReader(artifact))["document_id_hash"].to_pylist()
    rows = text_rows(artifact)
    documents = {
        (source, int(pair_id) % 7): value
        for pair_id, source, value in zip(rows["pair_id"].to_pylist(), rows["source"].to_pylist(), hashes, strict=True)
    }
    wanted = [
        documents[source, int(pair_id) % 7]
        for pair_id, source in zip(rows["pair_id"].to_pylist(), rows["source"].to_pylist(), strict=True)
    ]
    assert hashes == wanted
    assert len(set(documents.values())) == len(documents) == 7 * len(SOURCES)


def test_clusters_over_the_whole_corpus(tmp_path, in_process) -> None:
    config, _ = run(tmp_path, scope="corpus", mean_size=None, clusters=7)
    assert list(sizes(config)) == ["(all)"]
    assert len(sizes(config)["(all)"]) == 7


class FitsOnRay(InProcessExecutor):
    """Passes run here; a fit whose sample is too large for one process has actors of Ray, as under Ray's executor."""

    several_processes = True


def test_a_distributed_fit_is_the_local_one_bit_for_bit(tmp_path, in_process, ray_local, monkeypatch) -> None:
    fits = []
    original = distributed.fit_distributed
    monkeypatch.setattr(distributed, "fit_distributed", lambda *arguments: fits.append(1) or original(*arguments))
    settings = {"optional": ["weight"], "scope": "corpus"}
    _, local = run(tmp_path / "local", workers=1, **settings)
    monkeypatch.setattr(distributed, "LOCAL_BYTES", 0)
    monkeypatch.setattr(executor, "_current", FitsOnRay())
    for workers in (1, 2):
        _, spread = run(tmp_path / str(workers), workers=workers, **settings)
        assert [part.checksum for part in spread.parts] == [part.checksum for part in local.parts]
    assert len(fits) == 2


@pytest.mark.parametrize(("stratify", "sources"), [("random", ["(all)"]), ("source", sorted(SOURCES))])
def test_without_clusters_rows_are_cut_by_hash_into_shards(tmp_path, in_process, stratify, sources) -> None:
    config = embedded_workspace(str(tmp_path), SOURCES, settings={**SETTINGS, "batches": {"stratify": stratify}})
    manifest = cluster(config)
    reader = ShardReader(Workspace(config).clusters())
    assert reader.index.sources == sources
    assert set(reader.index.cluster.tolist()) == {0}
    assert reader.index.total_rows == TOTAL == manifest.counts.written
    assert len(np.unique(reader.index.shard)) > 2


def test_what_is_known_of_a_cluster(tmp_path, in_process) -> None:
    config, manifest = run(tmp_path)
    summary = manifest.details["sources"]["forum"]
    assert summary["rows"] == 1500
    assert sum(summary["histogram"].values()) == summary["clusters"]
    found = inspect_cluster(config, "forum", 0)
    words = {word for row in found["near"] for word in row["document"].split()} - {"about"}
    assert found["terms"][0] in words
    assert found["near"][0]["cosine"] >= found["far"][0]["cosine"]
    assert len(found["neighbours"]) == 3
    with pytest.raises(UsageError, match="no such cluster"):
        inspect_cluster(config, "forum", 10_000)
    with pytest.raises(UsageError, match="no such source"):
        inspect_cluster(config, "nowhere", 0)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, {"query", "document"}),
        ({"features": "query", "surrogate": "none"}, {"query"}),
        ({"surrogate": "none"}, {"document"}),
        ({"surrogate": "none", "duplicates": {"threshold": 0.99}}, {"query", "document"}),
    ],
)
def test_vectors_that_were_not_kept_give_the_same_shards(options, needed, tmp_path, in_process, monkeypatch) -> None:
    settings = {"cluster": {**SETTINGS["cluster"], "mean_size": 40, **options}, "embed": {"dtype": "float32"}}
    rows = {"forum": 120, "wiki": 30}
    kept = embedded_workspace(str(tmp_path / "kept"), rows, dimensions=384, settings=settings)
    fresh = embedded_workspace(
        str(tmp_path / "fresh"),
        rows,
        dimensions=384,
        settings={**settings, "embed": {"dtype": "float32", "persist": False}},
    )
    embedder, artifact = UnitEmbedder(kept), Workspace(kept).embeddings()
    parts = [
        write_parquet(artifact, "unit", embeddings_table(embedder.embed(unit)))
        for unit in row_groups_of(Workspace(kept).corpus.require())
    ]
    for config, persisted in ((kept, parts), (fresh, [])):
        embeddings = Workspace(config).embeddings()
        given = embeddings.require().model_copy(
            update={"parts": persisted, "details": {"dimensions": 384, "persisted": bool(persisted)}}
        )
        embeddings.folder.write(MANIFEST, given.model_dump_json().encode())
    embed, embedded = UnitEmbedder.embed, set()

    def recording(self, unit, *, rows=None, sides=SIDES):
        embedded.update(sides)
        return embed(self, unit, rows=rows, sides=sides)

    monkeypatch.setattr(UnitEmbedder, "embed", recording)
    manifests = [cluster(config) for config in (kept, fresh)]
    assert embedded == needed
    one, other = ([part.checksum for part in manifest.parts] for manifest in manifests)
    assert one == other
