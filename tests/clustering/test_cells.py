"""How many clusters each source gets, and what a row's group is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.clustering.cells import coarse_clusters, first_level, grouping_of, partitions_of
from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import WHOLE_CORPUS, Partitions
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.embedding.vectors import tasks
from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Counts, Manifest, Part

SOURCES = {"wiki": 100_000, "forum": 3000, "tiny": 40, "empty": 0}


def groups(cluster: dict[str, Any], batches: dict[str, Any] | None = None) -> dict[str, int]:
    config = RunConfig.model_validate({"workspace": "w", "cluster": cluster, "batches": batches or {}})
    manifest = Manifest(
        kind="corpus", fingerprint="f", created="", seconds=0, counts=Counts(), parts=[], details={"sources": SOURCES}
    )
    found = partitions_of(config, manifest)
    return dict(zip(found.names, found.clusters.tolist(), strict=True))


@pytest.mark.parametrize(
    ("cluster", "batches", "expected"),
    [
        ({"mean_size": 1000}, {}, {"wiki": 100, "forum": 3, "tiny": 1}),
        ({}, {"size": 500}, {"wiki": 50, "forum": 2, "tiny": 1}),
        ({"clusters": 100}, {}, {"wiki": 100, "forum": 100, "tiny": 2}),
        ({"clusters": 100, "scope": "corpus"}, {}, {WHOLE_CORPUS: 100}),
        ({"clusters": 100}, {"stratify": "random"}, {WHOLE_CORPUS: 1}),
        ({"clusters": 100}, {"stratify": "source"}, {"wiki": 1, "forum": 1, "tiny": 1}),
    ],
)
def test_clusters_follow_rows(cluster: dict[str, Any], batches: dict[str, Any], expected: dict[str, int]) -> None:
    assert groups(cluster, batches) == expected


def test_many_clusters_are_found_in_two_levels() -> None:
    manifest = Manifest(
        kind="corpus", fingerprint="f", created="", seconds=0, counts=Counts(), parts=[], details={"sources": SOURCES}
    )
    found = partitions_of(RunConfig.model_validate({"workspace": "w", "cluster": {"clusters": 6000}}), manifest)
    assert coarse_clusters(found, None)[found.names.index("wiki")] == round(6000**0.5)
    assert coarse_clusters(found, None)[found.names.index("forum")] == 0
    assert not coarse_clusters(found, 1).any()
    assert coarse_clusters(found, 2)[found.names.index("forum")] == round((3000 // 16) ** 0.5)


@pytest.mark.parametrize(
    ("batches", "cluster", "layout"),
    [
        ({"stratify": "random_groups"}, {}, "cluster"),
        ({"stratify": "group"}, {}, "group"),
        ({}, {"column": "group"}, "group"),
        ({"stratify": "source"}, {"column": "group"}, "source"),
    ],
)
def test_the_layout_that_a_strategy_needs(batches: dict[str, Any], cluster: dict[str, Any], layout: str) -> None:
    assert grouping_of(RunConfig.model_validate({"workspace": "w", "batches": batches, "cluster": cluster})) == layout


def test_rows_find_their_source_and_strangers_are_named() -> None:
    config = RunConfig(workspace="w")
    manifest = Manifest(
        kind="corpus", fingerprint="f", created="", seconds=0, counts=Counts(), parts=[], details={"sources": SOURCES}
    )
    found = partitions_of(config, manifest)
    assert found.names == ["forum", "tiny", "wiki"]
    assert found.of_rows(pa.chunked_array([["wiki", "forum"], ["tiny"]])).tolist() == [2, 0, 1]
    with pytest.raises(DataError, match="'stranger'"):
        found.of_rows(pa.chunked_array([["wiki", "stranger"]]))
    assert np.array_equal(found.rows, [3000, 40, 100_000])


@pytest.mark.parametrize(("units", "rows_of_unit"), [(10, 1024), (9000, 1024), (40, 65_536), (5000, 65_536)])
def test_tasks_are_few_and_bounded_in_rows(units: int, rows_of_unit: int) -> None:
    """However large the corpus is, a worker holds no more than 2^17 rows and a unit; ten times the rows, 3.2 times."""
    groups = {"role": PAIRS, "row_groups": [rows_of_unit] * units}
    part = Part(path="p", rows=units * rows_of_unit, bytes=0, checksum="", details=groups)
    corpus = Manifest(kind="corpus", fingerprint="f", created="", seconds=0, counts=Counts(), parts=[part])
    embeddings = corpus.model_copy(update={"details": {"persisted": False}})
    found = tasks(corpus, embeddings)
    assert [item.unit.number for task in found for item in task.payload] == list(range(units))
    assert sum(task.rows for task in found) == units * rows_of_unit
    assert max(task.rows for task in found) <= 2**17 + rows_of_unit
    rows = units * rows_of_unit
    assert min(units, rows**0.5 / 4 / 2) <= len(found) <= 1 + max(rows**0.5 / 4, rows / 2**17)
    for task in found:
        numbers = [item.unit.number for item in task.payload]
        assert task.covers == ((numbers[0], numbers[-1] + 1) if len(numbers) > 1 else ())


def test_many_sources_are_not_looked_through_for_every_row_group() -> None:
    class Names(list[str]):
        looked_through = 0

        def __iter__(self) -> Iterator[str]:
            self.looked_through += 1
            return super().__iter__()

    names = Names(f"source {number:03d}" for number in range(300))
    found = Partitions(names, np.full(300, 9), np.full(300, 2))
    for number in (7, 250, 7):
        assert found.of_rows(pa.chunked_array([[names[number], names[0]]])).tolist() == [number, 0]
    assert names.looked_through == 1
    cells = first_level(found, np.zeros(300, np.int64), 256)
    assert cells.first_bucket is cells.first_bucket
