"""One cell's centroids from its sample, and how they are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.features import project, projection, unit_length
from clusterbatch.clustering.kmeans import Fit, FitSettings, counted, fit
from clusterbatch.clustering.model import _centers
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partial_sums import Centers, Chunk, LocalRows, Rows, chunks_head, is_weightless
from clusterbatch.clustering.partitions import Cells
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.config import ClusterConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from clusterbatch.clustering.model import StoredModels
    from clusterbatch.clustering.warm_start import Previous

# Rows that a projection is fitted to.
_PROJECTION_ROWS = 32_768


@dataclass(frozen=True)
class FitJob:
    """What the fits of one level have in common. Picklable.

    level: 1, or 2 where cells are coarse clusters; above: the fits of the first level, where this is the second;
    matrices: by group, projections that those have.
    """

    sample: SampleChunks
    output: Artifact
    fingerprint: str
    groups: Groups
    cells: Cells
    config: ClusterConfig
    device: str
    level: int
    above: StoredModels
    matrices: Mapping[int, np.ndarray]
    # Groups whose clusters go on from the generation before, under their numbers.
    held: frozenset[int] = frozenset()
    # That generation, where its centroids stay as they are.
    frozen: Previous | None = None

    def buckets(self, cell: int) -> range:
        first = self.cells.first_bucket
        return range(int(first[cell]), int(first[cell + 1]))

    def settings(self, cell: int) -> FitSettings:
        return FitSettings(
            clusters=int(self.cells.clusters[cell]),
            passes=self.config.iterations,
            seed=self.config.seed,
            restarts=self.config.restarts,
            dtype=inference_dtype(self.config.dtype, resolve_device(self.device)),
            balanced=self.config.balanced,
        )

    def counting(self, cell: int) -> FitJob:
        """This job, or one that counts rows by their number where all those of the cell have weight 0."""
        if not is_weightless(self.sample.read(bucket) for bucket in self.buckets(cell)):
            return self
        return replace(self, sample=_UnweightedChunks(self.sample.artifact, self.sample.parts, self.sample.features))

    def fit(self, cell: int, rows: Rows, matrix: np.ndarray | None) -> Fit:
        """Of a cell's rows, which were projected by `matrix`."""
        kept, dtype = self._kept(cell, "centroids"), self.settings(cell).dtype
        if kept is not None:
            return counted(rows, _centers(kept), dtype)
        if not rows.chunk_rows:
            return counted(rows, self._unsampled(cell), dtype)
        return fit(rows, self.settings(cell), self.initial(cell, matrix))

    def _unsampled(self, cell: int) -> Centers:
        """Of a coarse cluster that no row of the sample is in: its own centroid, once, or as often as it has clusters
        that go on from the generation before."""
        group = int(self.cells.group[cell])
        centroid = self.above.load()[group].fine[0].centroids[self.cells.coarse[cell]]
        numbers = int(self.cells.clusters[cell]) if group in self.held else 1
        return Centers(np.tile(centroid, (numbers, 1)))

    def _kept(self, cell: int, content: str) -> pa.Table | None:
        """What the generation before has of a cell whose centroids stay as they are; None where it has none."""
        group, coarse = int(self.cells.group[cell]), int(self.cells.coarse[cell])
        if self.frozen is None or group not in self.held:
            return None
        artifact, parts = self.frozen.levels[self.level - 1]
        wanted = (content, self.groups.names[group], coarse)
        for part in parts:
            if (part.details["content"], part.details["group"], part.details["coarse"]) == wanted:
                return read_parquet(artifact.folder, part)
        return None

    def matrix(self, cell: int, chunks: Iterable[Chunk]) -> np.ndarray | None:
        """(D, `cluster.dimensions`) for a cell, fitted to the first of its rows; None where none is asked for."""
        group = int(self.cells.group[cell])
        if self.config.dimensions is None or group in self.matrices:
            return self.matrices.get(group)
        kept = self._kept(cell, "projection")
        if kept is not None:
            return vector_values(kept["direction"])
        head, _ = chunks_head(chunks, _PROJECTION_ROWS)
        return projection(head, min(self.config.dimensions, head.shape[1]), self.config.reduction, self.config.seed)

    def initial(self, cell: int, matrix: np.ndarray | None) -> np.ndarray | None:
        """(K, D) unit means of the sampled rows that the generation before put into each cluster, zeros where there is
        none; None for a group that begins anew."""
        if int(self.cells.group[cell]) not in self.held:
            return None
        sums: np.ndarray | None = None
        for bucket in self.buckets(cell):
            vectors, number = self.sample.read(bucket)[0], self.sample.previous(bucket)
            if not len(vectors):
                continue
            values, known = project(vectors.astype(np.float32), matrix), number >= 0
            if sums is None:
                sums = np.zeros((int(self.cells.clusters[cell]), values.shape[1]))
            np.add.at(sums, number[known], values[known])
        assert sums is not None, "a cell without rows"
        return unit_length(sums).astype(np.float32)

    def write(self, cell: int, found: Fit, matrix: np.ndarray | None, rows: int, seconds: float) -> Receipt:
        """Keeps a fit's centres in packing order (that of the generation they go on from), with a receipt."""
        centroids, bias = found.centers.centroids, found.centers.bias
        goes_on = int(self.cells.group[cell]) in self.held
        order = np.arange(len(centroids)) if goes_on else packing_order(centroids, found.sums.counts)
        columns = {
            "centroid": vector_column(centroids[order]),
            # Rows, whatever they weigh: by these shards are planned.
            "sampled": found.sums.rows[order].astype(np.float64),
            "bias": pa.nulls(len(order), pa.float32()) if bias is None else bias[order],
        }
        group = self.groups.names[self.cells.group[cell]]
        details = {"group": group, "level": self.level, "coarse": int(self.cells.coarse[cell])}
        share = self.config.drop_outliers
        # Centroids that nobody was near have no quality: the summary is of the others.
        quality: dict[str, Any] = {"mean_cosine": found.mean_cosine, "rounds": len(found.history)} if rows else {}
        parts = [
            write_parquet(
                self.output,
                f"centroids-{cell:05d}",
                pa.table(columns),
                content="centroids",
                outlier_below=-2.0 if share is None else found.sums.quantile(share),
                **quality,
                **details,
            )
        ]
        if matrix is not None:
            table = pa.table({"direction": vector_column(matrix)})
            parts.append(write_parquet(self.output, f"projection-{cell:05d}", table, content="projection", **details))
        counts = Counts(read=rows, written=rows)
        receipt = Receipt(unit=cell, fingerprint=self.fingerprint, parts=parts, counts=counts, seconds=seconds)
        self.output.write_receipt(receipt)
        return receipt


class FitWorker:
    """Fits the cell that is the unit's number, all of its sample in this process."""

    def __init__(self, job: FitJob) -> None:
        torch.set_num_threads(1)
        self._job = job

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        chunks = [self._job.sample.read(bucket) for bucket in self._job.buckets(unit.number)]
        chunks = [chunk for chunk in chunks if len(chunk[0])]
        matrix = self._job.matrix(unit.number, chunks)
        chunks = [(project(vectors, matrix), weights) for vectors, weights in chunks]
        found = self._job.fit(unit.number, LocalRows(chunks, self._job.device), matrix)
        rows = sum(len(vectors) for vectors, _ in chunks)
        return self._job.write(unit.number, found, matrix, rows, watch.seconds)


class _UnweightedChunks(SampleChunks):
    """The same rows, each counted once."""

    def read(self, bucket: int) -> Chunk:
        vectors, _ = super().read(bucket)
        return vectors, None
