"""The fits of all groups as they lie on storage: what workers read them from, whatever the number of centroids.

A group's finished fit: all that is needed to say which cluster a row belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.features import project
from clusterbatch.clustering.partial_sums import Centers
from clusterbatch.corpus.groups import Groups
from clusterbatch.embedding.vectors import vector_values
from clusterbatch.store import Artifact, Part
from clusterbatch.store.shuffle import read_bucket
from clusterbatch.store.tables import read_parquet


@dataclass(frozen=True)
class GroupModel:
    """Centroids of one group in packing order.

    fine: one entry, or one for each of the `coarse` centroids; shares: (K,) of the group's rows that each of the K
    clusters has, about; matrix: (D, d) projection of the features, None for none; outlier_below: rows whose cosine is
    lower are outliers; labels: (K,) the user's own names of the clusters, where those decide instead of the vectors.
    """

    fine: list[Centers]
    shares: np.ndarray
    coarse: Centers | None = None
    matrix: np.ndarray | None = None
    outlier_below: float = -2.0
    labels: pa.Array | None = None

    @property
    def first_of_coarse(self) -> np.ndarray:
        """(entries of `fine` + 1,) the first cluster of each."""
        return np.concatenate([[0], np.cumsum([len(centers.centroids) for centers in self.fine])])


# Coarse clusters that a row is looked for in: its nearest centroid may lie across a border of the nearest one. Four
# find nine tenths of what looking into all of them would find.
_PROBES = 4


class GroupAssigner:
    """Assigns feature vectors of a group's rows; in two levels that is O(sqrt(K)) for each row."""

    def __init__(self, model: GroupModel, device: str = "cpu") -> None:
        self._model = model
        self._coarse = _assigner(model.coarse, device) if model.coarse else None
        self._fine = [_assigner(centers, device) for centers in model.fine]
        # Where similarities are biased, one coarse cluster's clusters share out its rows among themselves.
        biased = any(centers.bias is not None for centers in model.fine)
        self._probes = 1 if biased else min(_PROBES, len(self._fine))
        self._first = model.first_of_coarse

    def __call__(self, vectors: np.ndarray, labels: pa.ChunkedArray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 cluster inside the group, and (N,) float32 cosine to its centroid, of (N, D) unit vectors."""
        vectors = project(vectors, self._model.matrix)
        if self._model.labels is not None:
            named = pc.index_in(labels, self._model.labels).to_numpy().astype(np.int64)
            return named, np.einsum("nd,nd->n", vectors, self._model.fine[0].centroids[named])
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


def cosine_to(model: GroupModel, vectors: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(N,) float32 cosine of (N, D) unit vectors to the centroids of given clusters, wherever they would go."""
    centroids = np.concatenate([centers.centroids for centers in model.fine])
    return np.einsum("nd,nd->n", project(vectors, model.matrix), centroids[clusters]).astype(np.float32)


def _assigner(centers: Centers, device: str) -> Assigner:
    return Assigner(centers.centroids, centers.bias, device=device)


def _centers(table: pa.Table) -> Centers:
    bias = None if table["bias"].null_count else table["bias"].to_numpy()
    return Centers(vector_values(table["centroid"]), bias)


def read_models(fitted: Artifact, parts: Sequence[Part], groups: Groups) -> dict[int, GroupModel]:
    """The fits of one level, by group; a group with several cells has their centres in `fine`, cell by cell."""
    numbers = {name: number for number, name in enumerate(groups.names)}
    cells: dict[int, list[tuple[Centers, np.ndarray, float]]] = {}
    matrices: dict[int, np.ndarray] = {}
    for part in sorted(parts, key=lambda part: (part.details["group"], part.details["coarse"])):
        group, table = numbers[part.details["group"]], read_parquet(fitted.folder, part)
        if part.details["content"] == "projection":
            matrices[group] = vector_values(table["direction"])
            continue
        fit_of_cell = (_centers(table), table["sampled"].to_numpy(), part.details["outlier_below"])
        cells.setdefault(group, []).append(fit_of_cell)
    models = {}
    for group, found in cells.items():
        sampled = np.concatenate([rows for _, rows, _ in found])
        models[group] = GroupModel(
            fine=[centers for centers, _, _ in found],
            shares=sampled / sampled.sum(),
            matrix=matrices.get(group),
            outlier_below=float(
                np.average([below for _, _, below in found], weights=[rows.sum() for _, rows, _ in found])
            ),
        )
    return models


def read_label_models(fitted: Artifact, parts: Sequence[Part], groups: Groups) -> dict[int, GroupModel]:
    """By group: a cluster for each label."""
    numbers = {name: number for number, name in enumerate(groups.names)}
    models = {}
    for part in parts:
        table = read_parquet(fitted.folder, part)
        rows = table["rows"].to_numpy()
        models[numbers[part.details["group"]]] = GroupModel(
            fine=[Centers(vector_values(table["centroid"]))],
            shares=rows / rows.sum(),
            labels=table["label"].combine_chunks(),
        )
    return models


@dataclass(frozen=True)
class PlacedRows:
    """The cluster of every row of the groups that are split, where that is not the nearest centroid's. Picklable."""

    artifact: Artifact
    parts: Sequence[Part]

    def of_task(self, task: int) -> dict[int, np.ndarray]:
        """By number of the corpus unit: (rows, 2) int64, row of the unit and cluster inside its group."""
        table = read_bucket(self.artifact, self.parts, task)
        if table is None:
            return {}
        unit = table["unit"].to_numpy()
        found = np.stack([table[name].to_numpy() for name in ("row", "cluster")], axis=1)
        return {number: found[unit == number] for number in np.unique(unit).tolist()}


@dataclass(frozen=True)
class StoredModels:
    """levels: for one or two levels, the pass that fitted it and its parts; labelled: clusters are the user's own;
    placed: where rows stand already, and centroids only describe their clusters."""

    groups: Groups
    levels: Sequence[tuple[Artifact, Sequence[Part]]] = field(default_factory=tuple)
    labelled: bool = False
    placed: PlacedRows | None = None

    @property
    def parts(self) -> list[tuple[Artifact, Part]]:
        return [(artifact, part) for artifact, parts in self.levels for part in parts]

    def load(self) -> dict[int, GroupModel]:
        """By group; groups that are not split have none."""
        models: dict[int, GroupModel] = {}
        for artifact, parts in self.levels:
            if self.labelled:
                return read_label_models(artifact, parts, self.groups)
            coarse = models
            models = {
                group: replace(model, coarse=coarse[group].fine[0], matrix=coarse[group].matrix)
                if group in coarse
                else model
                for group, model in read_models(artifact, parts, self.groups).items()
            }
            models = {**coarse, **models}
        return models
