"""A group's finished fit: all that is needed to say which cluster a row belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.features import project
from clusterbatch.clustering.sums import Centers


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
