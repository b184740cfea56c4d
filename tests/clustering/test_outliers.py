"""A share of a partition's rows are outliers, however its rows and cells differ from each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.clustering.cell_fit import FitLevel
from clusterbatch.clustering.cells import first_level, second_level
from clusterbatch.clustering.fit import FitWorker
from clusterbatch.clustering.model import KMeansClusters, PartitionAssigner, StoredParts
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.config import ClusterConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.runtime import WorkItem
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.shuffle import write_buckets
from tests.clustering.test_assign import unit

SHARE = 0.02
Dtype = Literal["float32", "bfloat16"]


def around(means: np.ndarray, rows: int, spread: float, seed: int) -> np.ndarray:
    """(rows, 16) unit vectors near any of (n, 16) means, stored as embeddings are."""
    random = np.random.default_rng(seed)
    noise = spread * random.standard_normal((rows, means.shape[1])) / np.sqrt(means.shape[1])
    vectors = means[random.integers(0, len(means), rows)] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def fitted(folder: Path, vectors: np.ndarray, clusters: int, dtype: Dtype, coarse: int = 0) -> KMeansClusters:
    """The fit of one partition, in two levels if there are `coarse` clusters."""
    rows = len(vectors)
    partitions = Partitions(["a"], np.array([rows]), np.array([clusters]))
    config = ClusterConfig(dtype=dtype, drop_outliers=SHARE)
    fits = KMeansClusters(partitions, "document")
    cells, cell = first_level(partitions, np.array([coarse]), 256), np.zeros(rows, np.int64)
    for number in (1, 2) if coarse else (1,):
        if number == 2:
            cells = second_level(partitions, {0: fits.models[0].shares}, 256)
            cell, _ = PartitionAssigner(fits.models[0])(vectors.astype(np.float32))
        sample = Artifact(Folder(str(folder / f"sample{number}")), "sample")
        chunk = np.arange(rows) % cells.chunks[cell]
        table = pa.table({"position": np.linspace(0, 1, rows), "vector": vector_column(vectors)})
        part = write_buckets(sample, 0, table, cells.first_bucket[cell] + chunk, cells.buckets)
        level = FitLevel(SampleChunks(sample, [part], "document"), cells, fits, config, "cpu")
        output = Artifact(Folder(str(folder / f"fit{number}")), "fit")
        parts = FitWorker(level).process(WorkItem(0, rows, range(len(cells))), output).parts
        fits = replace(fits, stored=(*fits.stored, StoredParts(output, parts)))
    return fits


def share_below(fits: KMeansClusters, vectors: np.ndarray) -> float:
    _, cosine = PartitionAssigner(fits.models[0])(vectors.astype(np.float32))
    return float(np.mean(cosine < fits.models[0].outlier_below))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.04, 0.06])
def test_rows_that_are_alike_are_not_outliers_together(tmp_path: Path, spread: float, dtype: Dtype) -> None:
    vectors = around(unit(3, 16, 0), 3000, spread, seed=1)
    assert share_below(fitted(tmp_path, vectors, 3, dtype), vectors) < 1.5 * SHARE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_rows_that_differ_the_share_is_kept(tmp_path: Path, dtype: Dtype) -> None:
    vectors = around(unit(8, 16, 0), 4000, 0.8, seed=1)
    assert share_below(fitted(tmp_path, vectors, 8, dtype), vectors) == pytest.approx(SHARE, rel=0.25)


def test_of_cells_that_differ_the_share_is_kept(tmp_path: Path) -> None:
    """Half of the coarse clusters are of near copies, whose low cosines are high ones of the other half."""
    coarse = unit(8, 16, 0)
    fine = around(np.repeat(coarse[:4], 16, axis=0), 64, 0.5, seed=1)
    tight, loose = around(fine.astype(float), 3000, 0.05, seed=2), around(coarse[4:], 3000, 0.8, seed=3)
    vectors = np.random.default_rng(4).permutation(np.concatenate([tight, loose]))
    fits = fitted(tmp_path, vectors, 64, "float32", coarse=8)
    assert share_below(fits, vectors) == pytest.approx(SHARE, rel=0.4)
