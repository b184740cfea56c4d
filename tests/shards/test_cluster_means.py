"""Means of clusters bear the numbers of the index, whatever a fit has called its centroids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterbatch.embedding.vectors import vector_values
from clusterbatch.reporting.cluster_views import cluster_map, cluster_rows, outliers
from clusterbatch.shards.cluster_means import as_stored, cluster_means
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.shards.statistics import inspect_source
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace
from tests.integration.test_cluster_stage import SETTINGS, SOURCES, all_runs


@pytest.mark.parametrize(
    "settings",
    [
        {"max_size": 40, "surrogate": "int8"},
        {"levels": 2, "mean_size": 60},
        {"min_size": 60, "max_size": 130, "features": "both", "surrogate_dimensions": 12},
    ],
)
def test_means_are_those_of_the_rows_of_each_cluster(tmp_path: Path, in_process: None, settings: dict[str, Any]):
    config = embedded_workspace(
        str(tmp_path), SOURCES, settings={"cluster": {**SETTINGS["cluster"], "drop_outliers": 0.02, **settings}}
    )
    manifest = cluster(config)
    artifact = Workspace(config).clusters()
    means = cluster_means(artifact, config.cluster)
    assert means is not None
    reader = ShardReader(artifact)
    side = "document" if "features" not in settings else "query"
    vectors = vector_values(all_runs(reader, vectors=True)[f"{side}_vector"]).astype(np.float64)
    index = reader.index
    of_row = np.repeat(np.arange(len(index)), index.rows)
    keys = [(index.sources[s], int(c)) for s, c in zip(index.source, index.cluster, strict=True)]
    assert sorted(means.names) == sorted(set(keys))
    cosines = {}
    for name, vector in zip(means.names, means.vectors, strict=True):
        mean = vectors[np.isin(of_row, [place for place, key in enumerate(keys) if key == name])].mean(axis=0)
        cosines[name] = float(vector @ mean / np.linalg.norm(mean))
    # From the first rows of each cluster; exact for those that have no more.
    assert min(cosines.values()) > 0.98
    # Means find the clusters of other vectors in the same stored form.
    again = as_stored(means.vectors, artifact, config.cluster) if "surrogate_dimensions" not in settings else None
    if again is not None:
        assert np.mean(means.nearest(again) == np.arange(len(again))) > 0.95

    shown = cluster_map(artifact, manifest, config.cluster)
    described = {
        (source, row["cluster"]): row
        for source in SOURCES
        if source != "tiny"
        for row in inspect_source(config, source)
    }
    assert {(each.source, each.cluster) for each in shown} == described.keys()
    for each in shown:
        row = described[each.source, each.cluster]
        assert (each.rows, each.terms) == (row["rows"], row["terms"][:5])
    assert sum(cluster_rows(artifact, manifest)) == manifest.counts.written
    farthest = outliers(artifact, manifest)
    assert len(farthest) == 10
    assert [each.cosine for each in farthest] == sorted(each.cosine for each in farthest)
    assert any(each.set_aside for each in farthest)


def test_shards_without_vectors_have_no_means(tmp_path: Path, in_process: None):
    config = embedded_workspace(
        str(tmp_path), SOURCES, settings={"cluster": {**SETTINGS["cluster"], "surrogate": "none"}}
    )
    manifest = cluster(config)
    artifact = Workspace(config).clusters()
    assert cluster_means(artifact, config.cluster) is None
    assert cluster_map(artifact, manifest, config.cluster) == []
