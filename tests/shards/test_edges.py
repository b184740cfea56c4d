"""Corpora at the edge: tasks and sources of no rows or one, equal rows, vectors of zeros or without a value."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import RunConfig
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.errors import DataError
from clusterbatch.shards.stage import cluster
from clusterbatch.store.artifact import MANIFEST
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace
from tests.clustering import embedded
from tests.clustering.embedded import blobs, embedded_workspace
from tests.integration.test_cluster_stage import SETTINGS, text_rows

SOURCES = {"forum": 300, "wiki": 40}
MINE = {"mine": {"negatives": 2, "first": 0, "last": 20, "margins": True, "consistency": 3}}
WAYS: dict[str, dict[str, Any]] = {
    "kmeans": {},
    "two levels": {"levels": 2, "mean_size": 20},
    "projected": {"dimensions": 8},
    "group": {"column": "group"},
    "communities": {"method": "communities", "mean_size": 16, "run_rows": 16, "neighbour_ranks": [2, 10]},
    "one cluster": {"mean_size": None, "clusters": 1},
}
pytestmark = pytest.mark.usefixtures("in_process")


def workspace_of(folder: Any, way: str, sources: dict[str, int] = SOURCES, **changes: Any) -> RunConfig:
    if way == "communities":
        pytest.importorskip("pymetis")
    settings = {"cluster": {**SETTINGS["cluster"], **WAYS[way]}, **(MINE if way in ("kmeans", "group") else {})}
    return embedded_workspace(str(folder), sources, optional=["group"], settings=settings, **changes)


def pair_ids(config: RunConfig) -> list[str]:
    artifact = Workspace(config).clusters()
    ids: list[str] = text_rows(artifact)["pair_id"].to_pylist()
    for part in artifact.require().parts:
        if part.details.get("content") == "outliers":
            ids += read_parquet(artifact.folder, part)["pair_id"].to_pylist()
    return sorted(ids)


def delete_last_row_group(config: RunConfig) -> int:
    """Delete its rows from the corpus, as `ingest --append` does; return how many these are."""
    corpus = Workspace(config).corpus
    manifest = corpus.require()
    part = manifest.parts[-1]
    groups = part.details["row_groups"]
    deleted = np.arange(sum(groups) - groups[-1], sum(groups))
    part.details["deleted"] = write_parquet(corpus, "deleted", pa.table({"row": deleted})).path
    part.details["deleted_rows"] = [*(0 for _ in groups[:-1]), groups[-1]]
    left = manifest.counts.written - len(deleted)
    sources = dict(manifest.details["sources"])
    for source in read_parquet(corpus.folder, part.path)["source"].take(pa.array(deleted)).to_pylist():
        sources[source] -= 1
    counts = manifest.counts.model_copy(update={"read": left, "written": left})
    changed = manifest.model_copy(update={"counts": counts, "details": {**manifest.details, "sources": sources}})
    corpus.folder.write(MANIFEST, changed.model_dump_json().encode())
    return len(deleted)


def replace_vectors(config: RunConfig, value: float, rows: int = 3) -> None:
    """Give the first rows of every unit vectors of one value."""
    artifact = Workspace(config).embeddings()
    manifest, parts = artifact.require(), []
    for part in manifest.parts:
        table = read_parquet(artifact.folder, part.path)
        for name in ("query_vector", "document_vector"):
            vectors = vector_values(table[name]).copy()
            vectors[:rows] = value
            table = table.set_column(table.schema.get_field_index(name), name, vector_column(vectors))
        parts.append(write_parquet(artifact, "unit", table))
    artifact.folder.write(MANIFEST, manifest.model_copy(update={"parts": parts}).model_dump_json().encode())


@pytest.mark.parametrize("way", WAYS)
def test_a_last_task_may_have_lost_all_of_its_rows(tmp_path, way: str) -> None:
    config = workspace_of(tmp_path, way, row_group_rows=64)
    deleted = delete_last_row_group(config)
    cluster(config)
    assert len(set(pair_ids(config))) == len(pair_ids(config)) == sum(SOURCES.values()) - deleted


@pytest.mark.parametrize("way", WAYS)
def test_sources_of_one_row_and_of_two(tmp_path, way: str) -> None:
    config = workspace_of(tmp_path, way, {"forum": 300, "one": 1, "two": 2})
    cluster(config)
    assert pair_ids(config) == [f"{row:06d}" for row in range(303)]


@pytest.mark.parametrize("way", WAYS)
def test_equal_rows_and_rows_without_direction(tmp_path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "blobs", partial(blobs, spread=0.0))
    config = workspace_of(tmp_path, way, centres=1, spread=0.0)
    replace_vectors(config, 0.0)
    cluster(config)
    assert pair_ids(config) == [f"{row:06d}" for row in range(sum(SOURCES.values()))]


@pytest.mark.parametrize("way", ["kmeans", "group", "two levels", "communities"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_by_row(tmp_path, way: str, value: float) -> None:
    config = workspace_of(tmp_path, way)
    replace_vectors(config, value)
    with pytest.raises(DataError, match=r"embeddings/unit-\w+\.parquet: .*vector of row 00\d{4} is not finite; embed "):
        cluster(config)
