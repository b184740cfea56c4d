"""Fits of cells that have no rows, or none with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from clusterbatch.clustering import fit_distributed as distributed
from clusterbatch.clustering.cell_fit import FitLevel
from clusterbatch.clustering.cells import Cells
from clusterbatch.clustering.fit import FitWorker
from clusterbatch.clustering.model import (
    KMeansClusters,
    StoredParts,
    describe_parts,
    read_fits,
    read_models,
    stored_fits,
)
from clusterbatch.clustering.partial_sums import Centers, LocalRows, PartialSums
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.clustering.warm_start import Previous, WarmStart
from clusterbatch.config import ClusterConfig, RunConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.runtime import Pool, WorkItem
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.tables import read_parquet
from tests.clustering.test_assign import unit

# Weights of the rows of three cells, a chunk each; a fourth has none.
WEIGHTS = ([0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 1.0], [1.0, 1.0, 1.0])


@pytest.fixture
def level(tmp_path: Path) -> FitLevel:
    """The second of two levels, with a cell for each of four coarse clusters."""
    sizes = [len(weights) for weights in WEIGHTS]
    rows = sum(sizes)
    sample = Artifact(Folder(str(tmp_path / "sample")), "sample")
    columns = {
        "position": np.linspace(0, 1, rows),
        "vector": vector_column(unit(rows, 4, 0).astype(np.float16)),
        "weight": np.concatenate(WEIGHTS).astype(np.float32),
        "previous": np.full(rows, -1),
    }
    part = write_buckets(sample, 0, pa.table(columns), np.repeat(np.arange(3), sizes), 4)
    partitions = Partitions(["a"], np.array([rows]), np.array([8]))
    numbers, ones = np.arange(4), np.ones(4, np.int64)
    first = FitLevel(
        sample=SampleChunks(sample, [part], "document"),
        cells=Cells(0 * numbers, 0 * numbers, 4 * ones, np.full(4, rows), np.ones(4), 3 * ones),
        above=KMeansClusters(partitions, "document"),
        config=ClusterConfig(dtype="float32"),
        device="cpu",
    )
    coarse = Artifact(Folder(str(tmp_path / "first")), "fit")
    fitted = FitWorker(first).process(WorkItem(0, rows, range(1)), coarse)
    return replace(
        first,
        cells=Cells(0 * numbers, numbers, 2 * ones, np.array([*sizes, 0]), np.ones(4), ones),
        above=KMeansClusters(partitions, "document", [StoredParts(coarse, fitted.parts)]),
    )


@pytest.fixture
def output(tmp_path: Path) -> Artifact:
    return Artifact(Folder(str(tmp_path / "second")), "fit")


def test_weights_are_left_out_if_none_of_a_cell_is_more_than_zero(level: FitLevel) -> None:
    for cell, weights in enumerate(WEIGHTS):
        read = distributed.countable(level, cell).read(cell)[1]
        assert read is None if not any(weights) else read.tolist() == weights


def test_shares_are_of_rows_and_a_cell_without_any_keeps_its_coarse_centroid(level: FitLevel, output: Artifact) -> None:
    worker = FitWorker(level)
    parts = [
        part for cell in range(4) for part in worker.process(WorkItem(cell, 1, range(cell, cell + 1)), output).parts
    ]
    # The same when they are read together.
    together = worker.process(WorkItem(0, 4, range(4)), output)
    assert len(together.parts) == 1
    alone, bundled = (
        list(read_fits(StoredParts(output, stored), stored_fits(stored))) for stored in (parts, together.parts)
    )
    assert [table for _, table in bundled] == [table for _, table in alone]
    for (details, table), (own, _) in zip(bundled, alone, strict=True):
        assert details == {**{name: own[name] for name in own if name in details}, "rows": table.num_rows}
    assert together.counts.written == 11
    model = read_models(StoredParts(output, parts), level.above.partitions)[0]
    assert [len(centers.centroids) for centers in model.fine] == [2, 2, 2, 1]
    coarse = level.above.models[0].fine[0].centroids
    np.testing.assert_array_equal(model.fine[3].centroids, coarse[3:])
    # Whatever they weigh.
    by_cell = np.add.reduceat(model.shares, model.first_of_coarse[:-1])
    np.testing.assert_allclose(by_cell, np.array([4, 4, 3, 0]) / 11)
    same = read_models(StoredParts(output, together.parts), level.above.partitions)[0]
    np.testing.assert_array_equal(same.centroids, model.centroids)
    assert describe_parts(together.parts) == describe_parts(parts)


def test_clusters_that_continue_keep_their_numbers_if_no_row_is_left(level: FitLevel, output: Artifact) -> None:
    previous = Previous(RunConfig(workspace="w"), 0, "document", [], [], "f", 0)
    warm = replace(level, warm=WarmStart(previous, frozenset([0])))
    [part] = FitWorker(warm).process(WorkItem(3, 1, range(3, 4)), output).parts
    assert read_parquet(output.folder, part)["sampled"].to_pylist() == [0, 0]


def test_a_large_fit_multiplies_as_its_workers_do(
    level: FitLevel, output: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver, which sees no GPU, deals out the work of workers that have one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    dtypes = []

    class RowsOnGpus(LocalRows):
        def __init__(self, sample: SampleChunks, buckets: range, matrix: None, pool: Pool, device: str) -> None:
            assert device == "cuda"
            super().__init__([sample.read(bucket) for bucket in buckets])

        def dtype(self, name: str) -> str:
            return "bfloat16"

        def partial_sums(self, centers: Centers, chunks: Sequence[int], dtype: torch.dtype) -> PartialSums:
            dtypes.append(dtype)
            return super().partial_sums(centers, chunks, torch.float32)

        def close(self) -> None:
            pass

    monkeypatch.setattr(distributed, "RemoteRows", RowsOnGpus)
    auto = replace(level, device="cuda", config=ClusterConfig(dtype="auto"))
    result = distributed.fit_distributed(auto, 2, output, Pool(1))
    assert result.counts.written == 3
    assert set(dtypes) == {torch.bfloat16}
