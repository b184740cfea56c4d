"""Fitted clusters: one protocol, whatever decides which cluster a row belongs to, and k-means' own implementation.

Fits are read from storage by the process that needs them, so that the driver's memory does not grow with centroids.

Legend: N rows, K clusters of a partition, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.features import Features, feature_vectors, project
from clusterbatch.clustering.outliers import NO_OUTLIERS, outlier_below
from clusterbatch.clustering.partial_sums import Centers
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import TaskUnit, vector_values
from clusterbatch.store import Artifact, Part
from clusterbatch.store.details import FitPart
from clusterbatch.store.tables import read_parquet, write_parquet


@dataclass(frozen=True)
class StoredParts:
    """Parts of an artifact, for example those of one pass. Picklable."""

    artifact: Artifact
    parts: Sequence[Part]


@dataclass(frozen=True)
class UnitRows:
    """N rows of one corpus unit, as `assign` takes them.

    task: number of the work item that the unit belongs to; table: (N,) columns of the corpus, at least pair_id and
    source, and `group` for the user's own groups; partition: (N,) int64.
    """

    task: int
    unit: TaskUnit
    table: pa.Table
    partition: np.ndarray


@dataclass(frozen=True)
class Assigned:
    """Clusters of N rows.

    cluster: (N,) int64, numbered inside the row's partition, 0 if that is not split; cosine: (N,) float32 to the
    cluster's centroid, NaN if not split; outlier: (N,) bool, whether the row is to be left out of training.
    """

    cluster: np.ndarray
    cosine: np.ndarray
    outlier: np.ndarray

    @classmethod
    def unsplit(cls, rows: int) -> Assigned:
        return cls(np.zeros(rows, np.int64), np.full(rows, np.nan, np.float32), np.zeros(rows, bool))


class FittedClusters(Protocol):
    """Clusters of all partitions. Picklable; what it has read from storage is not pickled."""

    @property
    def stored(self) -> Sequence[StoredParts]:
        """Parts that the clusters artifact keeps; empty if no partition is split."""
        ...

    def shares(self) -> Mapping[int, np.ndarray]:
        """Return for each split partition the (K,) shares of its rows that its clusters have, about."""
        ...

    def assign(self, rows: UnitRows, vectors: pa.Table | None) -> Assigned:
        """Return the cluster of each row.

        vectors: (N,) columns of the sides that are clustered, query_vector or document_vector; None only if nothing is
        `stored`.
        """
        ...

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return for each split partition, by name: centroids, mean_cosine (of the fit's rows), rounds (the most)."""
        ...


@dataclass(frozen=True)
class PartitionModel:
    """Centroids of one partition in packing order.

    fine: one entry, or one for each of the `coarse` centroids; shares: (K,) of the partition's rows, about; matrix:
    (D, d) projection of the features, None for none; outlier_below: rows with a lower cosine are outliers.
    """

    fine: list[Centers]
    shares: np.ndarray
    coarse: Centers | None = None
    matrix: np.ndarray | None = None
    outlier_below: float = NO_OUTLIERS

    @cached_property
    def first_of_coarse(self) -> np.ndarray:
        """(entries of `fine` + 1,) the first cluster of each entry."""
        return np.concatenate([[0], np.cumsum([len(centers.centroids) for centers in self.fine])])

    @cached_property
    def centroids(self) -> np.ndarray:
        """(K, d) centroids of all entries of `fine`."""
        return np.concatenate([centers.centroids for centers in self.fine])

    def cosine(self, vectors: np.ndarray, clusters: np.ndarray) -> np.ndarray:
        """Return the (N,) float32 cosines of (N, D) unit vectors to the centroids of the given (N,) clusters."""
        return np.einsum("nd,nd->n", project(vectors, self.matrix), self.centroids[clusters]).astype(np.float32)


class CentroidClusters(ABC):
    """Base of clusters that have centroids; a subclass says which cluster a row belongs to.

    Subclasses are frozen dataclasses with at least these fields. features: the vectors of a row that are clustered.
    """

    partitions: Partitions
    features: Features
    stored: Sequence[StoredParts]

    def __getstate__(self) -> dict[str, object]:
        # Without what `cached_property` keeps.
        return {field.name: self.__dict__[field.name] for field in fields(self)}  # type: ignore[arg-type]

    @property
    @abstractmethod
    def models(self) -> Mapping[int, PartitionModel]:
        """By partition; one that is not split has none."""

    @abstractmethod
    def clusters_of(self, partition: int, values: np.ndarray, rows: UnitRows, places: np.ndarray) -> Numbered:
        """Return (n,) int64 clusters inside the partition, and (n,) float32 cosines to their centroids.

        values: (n, D) float32 features; places: (n,) int64, which of `rows` they belong to.
        """

    def shares(self) -> Mapping[int, np.ndarray]:
        return {partition: model.shares for partition, model in self.models.items()}

    def assign(self, rows: UnitRows, vectors: pa.Table | None) -> Assigned:
        found = Assigned.unsplit(len(rows.partition))
        for partition, places, values in self.features_by_partition(rows, vectors):
            cluster, cosine = self.clusters_of(partition, values, rows, places)
            found.cluster[places], found.cosine[places] = cluster, cosine
            found.outlier[places] = cosine < self.models[partition].outlier_below
        return found

    def describe(self) -> dict[str, dict[str, Any]]:
        return describe_parts([part for stored in self.stored for part in stored.parts])

    def features_by_partition(
        self, rows: UnitRows, vectors: pa.Table | None, only: np.ndarray | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield for each split partition its number, (n,) places of its rows, and their (n, D) float32 features.

        only: (N,) bool, the rows to take; None: all.
        """
        for partition in np.unique(rows.partition).tolist():
            if partition not in self.models:
                continue
            assert vectors is not None, "clusters need vectors"
            chosen = rows.partition == partition
            places = np.flatnonzero(chosen if only is None else chosen & only)
            if len(places):
                yield partition, places, feature_vectors(vectors.take(pa.array(places)), self.features)


# (n,) int64 clusters and (n,) float32 cosines.
Numbered = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class KMeansClusters(CentroidClusters):
    """K-means in one or two levels: a row belongs to the nearest centroid of its partition.

    stored: the fits of each level, the coarse one first; device: of the matrix products.
    """

    partitions: Partitions
    features: Features
    stored: Sequence[StoredParts] = ()
    device: str = "cpu"

    @cached_property
    def models(self) -> Mapping[int, PartitionModel]:
        models: dict[int, PartitionModel] = {}
        for level in self.stored:
            finer = read_models(level, self.partitions)
            for partition, coarse in models.items():
                if partition in finer:
                    finer[partition] = replace(finer[partition], coarse=coarse.fine[0], matrix=coarse.matrix)
            models |= finer
        return models

    def clusters_of(self, partition: int, values: np.ndarray, rows: UnitRows, places: np.ndarray) -> Numbered:
        return self._assigners[partition](values)

    @cached_property
    def _assigners(self) -> dict[int, PartitionAssigner]:
        return {partition: PartitionAssigner(model, self.device) for partition, model in self.models.items()}


# Coarse clusters that a row is looked for in: its nearest centroid may lie across a border of the nearest one. Four
# find nine tenths of what looking into all of them would find.
_PROBES = 4


class PartitionAssigner:
    """Assign feature vectors of a partition's rows; with two levels in O(sqrt(K)) per row."""

    def __init__(self, model: PartitionModel, device: str = "cpu") -> None:
        self._model = model
        self._coarse = _assigner(model.coarse, device) if model.coarse else None
        self._fine = [_assigner(centers, device) for centers in model.fine]
        # With biases, the clusters of one coarse cluster share its rows among themselves.
        biased = any(centers.bias is not None for centers in model.fine)
        self._probes = 1 if biased else min(_PROBES, len(self._fine))
        self._first = model.first_of_coarse

    def __call__(self, vectors: np.ndarray) -> Numbered:
        """Return (N,) int64 clusters inside the partition and (N,) float32 cosines of (N, D) unit vectors."""
        vectors = project(vectors, self._model.matrix)
        if self._coarse is None:
            found = self._fine[0](vectors)
            return found.labels.numpy(), found.cosine.numpy()
        coarse = self._coarse.nearest(vectors, self._probes)
        clusters, cosine = np.zeros(len(vectors), np.int64), np.full(len(vectors), -np.inf, np.float32)
        order = np.argsort(coarse, axis=None, kind="stable")
        edges = np.searchsorted(coarse.ravel()[order], np.arange(len(self._fine) + 1))
        for number in np.flatnonzero(np.diff(edges)):
            rows = order[edges[number] : edges[number + 1]] // coarse.shape[1]
            found = self._fine[number](vectors[rows])
            nearer = found.cosine.numpy() > cosine[rows]
            clusters[rows[nearer]] = found.labels.numpy()[nearer] + self._first[number]
            cosine[rows[nearer]] = found.cosine.numpy()[nearer]
        return clusters, cosine


def _assigner(centers: Centers, device: str) -> Assigner:
    return Assigner(centers.centroids, centers.bias, device=device)


def read_centers(table: pa.Table) -> Centers:
    """Return the centres of a part whose content is `centroids`."""
    bias = None if table["bias"].null_count else table["bias"].to_numpy()
    return Centers(vector_values(table["centroid"]), bias)


# Details and table of a cell's centroids, projection or labels.
NamedFit = tuple[FitPart, pa.Table]


def write_fits(output: Artifact, number: int, fits: Sequence[NamedFit]) -> list[Part]:
    """Write the fits of a work item's cells, one part for each content; number: of the item."""
    by_kind: dict[tuple[str, str], list[NamedFit]] = {}
    for details, table in fits:
        by_kind.setdefault((details["content"], str(table.schema)), []).append((details, table))
    parts = []
    for (content, _), of_kind in by_kind.items():
        described: dict[str, Any] = dict(of_kind[0][0])
        if len(of_kind) > 1:
            cells = [{**details, "rows": table.num_rows} for details, table in of_kind]
            described = {name: described[name] for name in ("content", "level") if name in described} | {"cells": cells}
        table = pa.concat_tables([table for _, table in of_kind])
        parts.append(write_parquet(output, f"{content}-{number:05d}", table, **described))
    return parts


@dataclass(frozen=True)
class StoredFit:
    """The fit of one cell: rows [first, first + rows) of a part that `write_fits` has written."""

    details: FitPart
    part: Part
    first: int
    rows: int


def stored_fits(parts: Sequence[Part]) -> list[StoredFit]:
    """Return the fits that the parts hold, part by part."""
    found = []
    for part in parts:
        first = 0
        for details in part.details.get("cells", [part.details]):
            rows = details.get("rows", part.rows)
            found.append(StoredFit(details, part, first, rows))
            first += rows
    return found


def read_fits(level: StoredParts, wanted: Sequence[StoredFit]) -> Iterator[NamedFit]:
    """Yield each fit with its table; each part is read once if its fits follow one another."""
    for _, of_part in groupby(wanted, key=lambda fit: fit.part.path):
        fits = list(of_part)
        table = read_parquet(level.artifact.folder, fits[0].part)
        for fit in fits:
            yield fit.details, table.slice(fit.first, fit.rows)


def read_models(level: StoredParts, partitions: Partitions) -> dict[int, PartitionModel]:
    """Read the fits of one level, by partition; the centres of its cells are in `fine`, cell by cell.

    Fits of other partitions are left out.
    """
    numbers = {name: number for number, name in enumerate(partitions.names)}
    cells: dict[int, dict[int, NamedFit]] = {}
    matrices: dict[int, np.ndarray] = {}
    for details, table in read_fits(
        level, [fit for fit in stored_fits(level.parts) if fit.details["group"] in numbers]
    ):
        partition = numbers[details["group"]]
        if details["content"] == "projection":
            matrices[partition] = vector_values(table["direction"])
        else:
            cells.setdefault(partition, {})[details["coarse"]] = details, table
    models = {}
    for partition in sorted(cells):
        found = [cell for _, cell in sorted(cells[partition].items())]
        sampled = [table["sampled"].to_numpy() for _, table in found]
        rows = np.concatenate(sampled)
        models[partition] = PartitionModel(
            fine=[read_centers(table) for _, table in found],
            shares=rows / rows.sum(),
            matrix=matrices.get(partition),
            outlier_below=outlier_below([details for details, _ in found], [each.sum() for each in sampled]),
        )
    return models


def describe_parts(parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """Summarise fits for `FittedClusters.describe`; of two levels the finer one."""
    by_partition: dict[str, dict[int, list[StoredFit]]] = {}
    for fit in stored_fits(parts):
        if "mean_cosine" in fit.details:
            levels = by_partition.setdefault(fit.details["group"], {})
            levels.setdefault(fit.details.get("level", 1), []).append(fit)
    summary = {}
    for partition, levels in by_partition.items():
        chosen = levels[max(levels)]
        centroids = sum(fit.rows for fit in chosen)
        summary[partition] = {
            "centroids": centroids,
            "mean_cosine": round(sum(fit.rows * fit.details["mean_cosine"] for fit in chosen) / centroids, 5),
            "rounds": max(fit.details.get("rounds", 1) for fit in chosen),
        }
    return summary
