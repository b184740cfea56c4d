"""The next generation's clusters go on from the last one's: same numbers, whatever space the rows now lie in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import blobs, embedded_workspace
from tests.integration.test_cluster_stage import text_rows

SOURCES = {"forum": 900, "tiny": 20, "wiki": 600}
CLUSTER = {"mean_size": 100, "run_rows": 16, "shard_bytes": 2**16, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("in_process")


def test_a_fit_keeps_the_numbers_it_begins_with() -> None:
    vectors, label = blobs(2000, 7, 16, seed=1)
    means = np.array([vectors[label == number].mean(axis=0) for number in range(7)])
    # One that is not known is found all the same.
    initial = means / np.linalg.norm(means, axis=1, keepdims=True)
    initial[4] = 0
    found = fit(LocalRows.of(vectors, clusters=7), FitSettings(7), initial)
    assert np.all(np.sum(found.centers.centroids * initial, axis=1)[[0, 1, 2, 3, 5, 6]] > 0.99)
    assert found.mean_cosine > 0.9


def _next_embeddings(config: RunConfig, turn: np.ndarray, strangers: int = 0) -> None:
    """Generation 1: the same rows in a space that is turned; the first `strangers` of each unit lie anywhere."""
    workspace, random = Workspace(config), np.random.default_rng(9)
    before = workspace.embeddings().require()
    parts = []
    for part in before.parts:
        table = read_parquet(workspace.embeddings().folder, part.path)
        for place, name in enumerate(table.column_names):
            if name.endswith("_vector"):
                values = vector_values(table[name]).astype(np.float32) @ turn
                values[:strangers] = random.standard_normal((strangers, turn.shape[1]))
                values /= np.linalg.norm(values, axis=1, keepdims=True)
                table = table.set_column(place, name, vector_column(values.astype(np.float16)))
        parts.append(write_parquet(workspace.embeddings(1), "unit", table))
    counts = Counts(read=before.counts.read, written=before.counts.written)
    receipt = Receipt(unit=0, fingerprint="next", parts=parts, counts=counts)
    details = {"dimensions": turn.shape[1]}
    workspace.embeddings(1).commit("next", [receipt], config={}, inputs={}, seconds=0, details=details)


def _clusters(config: RunConfig, generation: int) -> dict[str, tuple[str, int]]:
    """(source, centroid) by pair_id."""
    rows = text_rows(Workspace(config).clusters(generation)).select(["pair_id", "source", "centroid"])
    return {row["pair_id"]: (row["source"], row["centroid"]) for row in rows.to_pylist()}


@pytest.mark.parametrize(
    "settings", [{}, {"levels": 2}, {"dimensions": 8, "features": "both"}], ids=["flat", "two levels", "projected"]
)
def test_the_same_rows_in_another_space_keep_their_clusters(tmp_path, settings: dict[str, Any]) -> None:
    config = _workspace(tmp_path, settings)
    cluster(config)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((16, 16)))[0].astype(np.float32)
    _next_embeddings(config, np.concatenate([turn, np.zeros((16, 8), np.float32)], axis=1))
    manifest = cluster(config, generation=1, previous=Previous.of(config, 0))
    assert manifest.counts.written == sum(SOURCES.values())
    old, new = _clusters(config, 0), _clusters(config, 1)
    assert len(set(old.values())) > 10
    # Where the fit began: iterations may still improve on the first generation, but no number changes its meaning.
    assert np.mean([old[pair] == new[pair] for pair in old]) > 0.9


def test_a_kept_share_stays_where_it_was_and_the_rest_moves(tmp_path) -> None:
    config = _workspace(tmp_path, {})
    cluster(config)
    _next_embeddings(config, np.eye(16, dtype=np.float32), strangers=128)
    old = _clusters(config, 0)
    stayed = {}
    for keep in (0.0, 0.6):
        cluster(config, generation=1, previous=Previous.of(config, 0, keep), force=True)
        new = _clusters(config, 1)
        stayed[keep] = np.mean([old[pair] == new[pair] for pair in old])
    # Half of the rows lie anywhere now: of those that move, six in ten are kept.
    moved = 1 - stayed[0.0]
    assert moved > 0.3
    assert 1 - stayed[0.6] == pytest.approx(0.4 * moved, abs=0.06)


def test_a_source_that_has_changed_its_size_begins_anew(tmp_path) -> None:
    config = _workspace(tmp_path, {})
    cluster(config)
    _next_embeddings(config, np.eye(16, dtype=np.float32))
    finer = config.model_copy(update={"cluster": config.cluster.model_copy(update={"mean_size": 30})})
    manifest = cluster(finer, generation=1, previous=Previous.of(config, 0))
    assert manifest.details["fit"]["forum"]["centroids"] == 30


def _workspace(folder: Any, settings: dict[str, Any]) -> RunConfig:
    config = embedded_workspace(str(folder / "ws"), SOURCES, settings={"cluster": {**CLUSTER, **settings}})
    artifact = Workspace(config).embeddings()
    manifest = artifact.require().model_copy(update={"inputs": {"corpus": "given"}})
    artifact.folder.write("manifest.json", manifest.model_dump_json().encode())
    return config
