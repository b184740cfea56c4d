"""What is said of clusters, from what buckets know of their pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.embedding.vectors import vector_column
from clusterbatch.shards import statistics
from clusterbatch.shards.cluster_facts import cluster_facts
from clusterbatch.shards.statistics import StatisticsJob, gini
from clusterbatch.store import Artifact, Folder, Part
from clusterbatch.store.tables import read_parquet, write_parquet
from tests.clustering.test_assign import unit


def facts(artifact: Artifact, sizes: list[int], seed: int) -> tuple[Part, np.ndarray]:
    """The facts of one bucket with pieces of these sizes, and the vectors of its rows."""
    rows = sum(sizes)
    vectors = unit(rows, 8, seed)
    table = pa.table(
        {
            "pair_id": [f"{seed}-{row}" for row in range(rows)],
            "query": ["what"] * rows,
            "document": [f"word{seed} text {row}" for row in range(rows)],
            "document_hash": np.arange(rows, dtype=np.uint64),
            "cosine": np.linspace(0.1, 0.9, rows, dtype=np.float32),
            "document_vector": vector_column(vectors),
        }
    )
    pieces = [{"rows": size} for size in sizes]
    return write_parquet(artifact, f"facts-{seed}", cluster_facts(table, pieces, "document")), vectors


def test_pieces_of_a_cluster_are_one_row_and_sources_stay_apart(tmp_path: Path) -> None:
    artifact = Artifact(Folder(str(tmp_path)), "facts")
    made = [facts(artifact, sizes, seed) for seed, sizes in enumerate(([10, 4], [6], [5, 7, 8]))]
    keys = [[("a", 0), ("a", 1)], [("a", 1)], [("a", 2), ("b", 0), ("b", 1)]]
    job = StatisticsJob(artifact, [part for part, _ in made], keys, artifact)
    (table, farthest), summary = job.run()
    rows = read_parquet(artifact.folder, table.path).to_pylist()
    assert [(row["source"], row["cluster"], row["rows"]) for row in rows] == [
        ("a", 0, 10),
        ("a", 1, 10),
        ("a", 2, 5),
        ("b", 0, 7),
        ("b", 1, 8),
    ]
    assert {source: (found["rows"], found["clusters"]) for source, found in summary.items()} == {
        "a": (25, 3),
        "b": (15, 2),
    }
    # The nearest rows of a cluster in two buckets come from both.
    assert rows[1]["near"][0]["cosine"] == pytest.approx(0.9)
    of_b = np.array([made[2][1][5:12].sum(axis=0), made[2][1][12:].sum(axis=0)])
    cosine = of_b[0] @ of_b[1] / np.linalg.norm(of_b, axis=1).prod()
    assert [near["cluster"] for near in rows[3]["neighbours"]] == [1]
    assert rows[3]["neighbours"][0]["cosine"] == pytest.approx(cosine, abs=1e-5)
    lowest = read_parquet(artifact.folder, farthest.path)
    assert lowest.num_rows == 3 * 5
    assert lowest["cosine"][0].as_py() == pytest.approx(0.1)


def test_neighbours_are_the_same_in_blocks_as_long_as_the_window_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    centroids = unit(50, 6, 0)
    numbers = list(range(100, 150))
    whole = statistics._neighbours(numbers, centroids)
    similarity = centroids @ centroids.T - 2 * np.eye(50)
    assert [near[0]["cluster"] - 100 for near in whole] == similarity.argmax(axis=1).tolist()
    monkeypatch.setattr(statistics, "_BLOCK", 7)
    in_blocks = statistics._neighbours(numbers, centroids)
    assert [[near["cluster"] for near in row] for row in in_blocks] == [
        [near["cluster"] for near in row] for row in whole
    ]
    monkeypatch.setattr(statistics, "_WINDOW", 5)
    for number, near in enumerate(statistics._neighbours(numbers, centroids)):
        first = number // 7 * 7
        assert all(first - 5 <= found["cluster"] - 100 < first + 12 for found in near)
        assert number not in [found["cluster"] - 100 for found in near]


def test_gini_of_equal_and_of_single_clusters() -> None:
    assert gini(np.full(10, 7)) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 100])) == pytest.approx(0.75)
