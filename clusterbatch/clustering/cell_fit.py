"""The fit of one cell: its projection, its first centroids, and its centroids as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.cells import Cells
from clusterbatch.clustering.features import project, projection, unit_length
from clusterbatch.clustering.kmeans import Fit, FitSettings, fit, fixed
from clusterbatch.clustering.model import KMeansClusters, NamedFit, read_centers
from clusterbatch.clustering.outliers import outlier_details
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partial_sums import Centers, Chunk, Rows, chunks_head
from clusterbatch.clustering.sample import SampleChunks, SampledChunk
from clusterbatch.clustering.warm_start import WarmStart
from clusterbatch.config import ClusterConfig
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.store.details import FitPart

# Rows that a projection is fitted to.
_PROJECTION_ROWS = 32_768


@dataclass(frozen=True)
class FitLevel:
    """Settings that the fits of one level have in common. Picklable.

    above: the fits of the coarse level if this is the second, otherwise without any; device: of the matrix products;
    warm: the partitions that continue the generation before, None if none does.
    """

    sample: SampleChunks
    cells: Cells
    above: KMeansClusters
    config: ClusterConfig
    device: str
    warm: WarmStart | None = None

    @property
    def number(self) -> int:
        """1, or 2 if cells are coarse clusters."""
        return 1 + len(self.above.stored)


class CellFit:
    """The fit of one cell of a level: a partition, or one coarse cluster of a partition."""

    def __init__(self, level: FitLevel, cell: int) -> None:
        self._level, self._cell = level, cell
        self._partition, self._coarse = int(level.cells.partition[cell]), int(level.cells.coarse[cell])
        self._clusters = int(level.cells.clusters[cell])
        self._name = level.above.partitions.names[self._partition]
        self._continues = level.warm is not None and self._partition in level.warm.held

    def chunks(self) -> Iterator[Chunk]:
        """Read the chunks of the sample one by one, empty ones included."""
        return (self._level.sample.read(bucket) for bucket in self._level.cells.buckets_of(self._cell))

    def sampled(self) -> Iterator[SampledChunk]:
        """Read the chunks of the sample with their clusters in the generation before, one by one."""
        for bucket in self._level.cells.buckets_of(self._cell):
            yield from self._level.sample.read_all(range(bucket, bucket + 1))

    def projection(self, chunks: Iterable[Chunk]) -> np.ndarray | None:
        """Return (D, `cluster.dimensions`) fitted to the first of the rows; None if that is not set."""
        config = self._level.config
        if config.dimensions is None:
            return None
        above = self._level.above.models.get(self._partition)
        if above is not None and above.matrix is not None:
            return above.matrix
        stored = self._frozen("projection")
        if stored is not None:
            return vector_values(stored["direction"])
        head, _ = chunks_head(chunks, _PROJECTION_ROWS)
        return projection(head, min(config.dimensions, head.shape[1]), config.reduction, config.seed)

    def fit(self, rows: Rows, matrix: np.ndarray | None, sampled: Iterable[SampledChunk]) -> Fit:
        """Fit the cell's rows, projected by `matrix`; frozen centroids and those of a cell without rows stay.

        sampled: the same rows as they were sampled, read only if the fit continues the generation before.
        """
        found = self._fit(rows, matrix, sampled)
        if self._level.config.drop_outliers is None:
            return found
        # Rows are assigned in float32, to the last centroids: so are those that say which cosines are low.
        return replace(found, sums=fixed(rows, found.centers, torch.float32).sums)

    def _fit(self, rows: Rows, matrix: np.ndarray | None, sampled: Iterable[SampledChunk]) -> Fit:
        config = self._level.config
        settings = FitSettings(
            clusters=self._clusters,
            passes=config.iterations,
            seed=config.seed,
            restarts=config.restarts,
            dtype=inference_dtype(config.dtype, resolve_device(self._level.device)),
            balanced=config.balanced,
        )
        stored = self._frozen("centroids")
        if stored is not None:
            return fixed(rows, read_centers(stored), settings.dtype)
        if not rows.chunk_rows:
            return fixed(rows, self._without_rows(), settings.dtype)
        return fit(rows, settings, self._previous_means(sampled, matrix) if self._continues else None)

    def table(self, found: Fit, matrix: np.ndarray | None) -> list[NamedFit]:
        """Return what is stored: the centres in packing order, or in that of the generation that they continue."""
        centroids, bias = found.centers.centroids, found.centers.bias
        order = np.arange(len(centroids)) if self._continues else packing_order(centroids, found.sums.counts)
        columns = {
            "centroid": vector_column(centroids[order]),
            # Rows, whatever they weigh: shards are planned by these.
            "sampled": found.sums.rows[order].astype(np.float64),
            "bias": pa.nulls(len(order), pa.float32()) if bias is None else bias[order],
        }
        details = self._details("centroids") | outlier_details(found.sums, self._level.config.drop_outliers)
        # Centroids of a cell without rows have no quality: the summary leaves them out.
        if found.sums.rows.any():
            details |= {"mean_cosine": found.mean_cosine, "rounds": len(found.history)}
        stored: list[NamedFit] = [(details, pa.table(columns))]
        if matrix is not None:
            stored.append((self._details("projection"), pa.table({"direction": vector_column(matrix)})))
        return stored

    def _details(self, content: Literal["centroids", "projection"]) -> FitPart:
        return FitPart(content=content, group=self._name, level=self._level.number, coarse=self._coarse)

    def _without_rows(self) -> Centers:
        """Return the centroid of a coarse cluster that no sampled row is in, as often as it must have clusters."""
        centroid = self._level.above.models[self._partition].fine[0].centroids[self._coarse]
        return Centers(np.tile(centroid, (self._clusters if self._continues else 1, 1)))

    def _frozen(self, content: str) -> pa.Table | None:
        warm = self._level.warm
        if warm is None or not warm.previous.frozen or not self._continues:
            return None
        return warm.stored_table(self._level.number, content, self._name, self._coarse)

    def _previous_means(self, sampled: Iterable[SampledChunk], matrix: np.ndarray | None) -> np.ndarray:
        """Return (K, D) unit means of the sampled rows by their cluster in the generation before, zeros if none."""
        sums: np.ndarray | None = None
        for each in sampled:
            vectors, number = each.chunk[0], each.previous
            if not len(vectors):
                continue
            values, known = project(vectors.astype(np.float32), matrix), number >= 0
            if sums is None:
                sums = np.zeros((self._clusters, values.shape[1]))
            np.add.at(sums, number[known], values[known])
        assert sums is not None, "a cell without rows"
        return unit_length(sums).astype(np.float32)
