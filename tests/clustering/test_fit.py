"""What a fit makes of cells that have no rows, or none with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from clusterbatch.clustering import fit_distributed as distributed
from clusterbatch.clustering.fit import FitJob, FitWorker
from clusterbatch.clustering.model import StoredModels, read_models
from clusterbatch.clustering.partial_sums import Centers, LocalRows, PartialSums
from clusterbatch.clustering.partitions import Cells
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.config import ClusterConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.runtime import Pool, Unit
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.tables import read_parquet
from tests.clustering.test_assign import unit

# Weights of the rows of three cells, a chunk each; a fourth has none.
WEIGHTS = ([0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 1.0], [1.0, 1.0, 1.0])


@pytest.fixture
def job(tmp_path: Path) -> FitJob:
    sizes = [len(weights) for weights in WEIGHTS]
    rows = sum(sizes)
    sample = Artifact(Folder(str(tmp_path / "sample")), "sample")
    columns = {
        "position": np.linspace(0, 1, rows),
        "vector": vector_column(unit(rows, 4, 0).astype(np.float16)),
        "weight": np.concatenate(WEIGHTS).astype(np.float32),
    }
    part = write_buckets(sample, 0, pa.table(columns), np.repeat(np.arange(3), sizes), 4)
    groups = Groups(["a"], np.array([rows]), np.array([8]))
    numbers, ones = np.arange(4), np.ones(4, np.int64)
    first = FitJob(
        sample=SampleChunks(sample, [part], "document"),
        output=Artifact(Folder(str(tmp_path / "first")), "fit"),
        fingerprint="f",
        groups=groups,
        cells=Cells(0 * numbers, 0 * numbers, 4 * ones, np.full(4, rows), np.ones(4), 3 * ones),
        config=ClusterConfig(dtype="float32"),
        device="cpu",
        level=1,
        above=StoredModels(groups),
        matrices={},
    )
    fitted = FitWorker(first).process(Unit(0, rows, None))
    return replace(
        first,
        output=Artifact(Folder(str(tmp_path / "second")), "fit"),
        cells=Cells(0 * numbers, numbers, 2 * ones, np.array([*sizes, 0]), np.ones(4), ones),
        level=2,
        above=StoredModels(groups, ((first.output, fitted.parts),)),
    )


def test_weights_are_left_out_where_none_of_a_cell_is_more_than_zero(job: FitJob) -> None:
    for cell, weights in enumerate(WEIGHTS):
        read = job.counting(cell).sample.read(cell)[1]
        assert read is None if not any(weights) else read.tolist() == weights


def test_shares_are_of_rows_and_a_cell_without_any_keeps_its_coarse_centroid(job: FitJob) -> None:
    worker = FitWorker(job)
    parts = [part for cell in range(4) for part in worker.process(Unit(cell, 1, None)).parts]
    model = read_models(job.output, parts, job.groups)[0]
    assert [len(centers.centroids) for centers in model.fine] == [2, 2, 2, 1]
    coarse = job.above.load()[0].fine[0].centroids
    np.testing.assert_array_equal(model.fine[3].centroids, coarse[3:])
    # Whatever they weigh.
    by_cell = np.add.reduceat(model.shares, model.first_of_coarse[:-1])
    np.testing.assert_allclose(by_cell, np.array([4, 4, 3, 0]) / 11)


def test_clusters_that_go_on_keep_their_numbers_where_no_row_is_left(job: FitJob) -> None:
    [part] = FitWorker(replace(job, held=frozenset([0]))).process(Unit(3, 1, None)).parts
    assert read_parquet(job.output.folder, part)["sampled"].to_pylist() == [0, 0]


def test_a_large_fit_goes_by_what_its_workers_multiply_with(job: FitJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver, which sees no GPU, deals out the work of those that have one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    dtypes = []

    class Rows(LocalRows):
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

    monkeypatch.setattr(distributed, "RemoteRows", Rows)
    auto = replace(job, device="cuda", config=ClusterConfig(dtype="auto"))
    receipt = distributed.fit_distributed(auto, 2, Pool(1))
    assert receipt.counts.written == 3
    assert set(dtypes) == {torch.bfloat16}
