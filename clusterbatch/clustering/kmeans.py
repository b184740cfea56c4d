"""Spherical mini-batch k-means. No Ray: whoever holds the rows answers with mergeable sums.

The rows of a fit are a sample in random order, cut into fixed chunks. A round takes the first chunks (more of them from
round to round: nested mini-batches), asks for their partial sums under the present centroids, and merges them in chunk
order. So the result is the same, bit for bit, however many workers share the chunks.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.seeding import seed_centroids

CHUNK_ROWS = 8192
# A centroid with less than this share of the mean cluster's weight is moved into the heaviest cluster.
_TINY = 0.05


@dataclass(frozen=True)
class FitSettings:
    """What decides a fit, together with the rows."""

    clusters: int
    iterations: int = 20
    seed: int = 0
    dtype: torch.dtype = torch.float32
    # Rounds stop early when the mean cosine gains less than this share.
    tolerance: float = 1e-4


@dataclass
class PartialSums:
    """What a chunk contributes under given centroids: mergeable by addition. Accumulators are float64."""

    counts: np.ndarray  # (K,) weight of the rows nearest each centroid
    sums: np.ndarray  # (K, D) their weighted sum
    cosine: float  # weighted sum of the rows' cosine to their centroid

    def __add__(self, other: PartialSums) -> PartialSums:
        return PartialSums(self.counts + other.counts, self.sums + other.sums, self.cosine + other.cosine)


@dataclass
class Fit:
    """centroids: (K, D) float32, unit length; counts: (K,) float64, weight of the fit's rows nearest each."""

    centroids: np.ndarray
    counts: np.ndarray
    mean_cosine: float
    history: list[float] = field(default_factory=list)


class Rows(Protocol):
    """Rows of a fit in fixed chunks, wherever they are."""

    @property
    def chunk_rows(self) -> list[int]:
        """Rows of each chunk."""
        ...

    def head(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` vectors (count, D) float32 and their weights (count,), for seeding."""
        ...

    def partial_sums(self, centroids: np.ndarray, chunks: int, dtype: torch.dtype) -> Sequence[PartialSums]:
        """Sums of the first `chunks` chunks, in chunk order."""
        ...


class LocalRows:
    """All rows in this process: vectors (N, D) of unit length, any float type; weights (N,) or None."""

    def __init__(self, vectors: np.ndarray, weights: np.ndarray | None = None, chunk_rows: int = CHUNK_ROWS) -> None:
        self._chunks = [
            (vectors[start : start + chunk_rows], None if weights is None else weights[start : start + chunk_rows])
            for start in range(0, len(vectors), chunk_rows)
        ]

    @property
    def chunk_rows(self) -> list[int]:
        return [len(vectors) for vectors, _ in self._chunks]

    def head(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.concatenate([chunk for chunk, _ in self._chunks[: -(-count // len(self._chunks[0][0]))]])[:count]
        weights = [np.ones(len(chunk)) if weight is None else weight for chunk, weight in self._chunks]
        return vectors.astype(np.float32), np.concatenate(weights)[:count]

    def partial_sums(self, centroids: np.ndarray, chunks: int, dtype: torch.dtype) -> Sequence[PartialSums]:
        assigner = Assigner(torch.from_numpy(centroids), dtype)
        return [chunk_sums(assigner, vectors, weights) for vectors, weights in self._chunks[:chunks]]


def chunk_sums(assigner: Assigner, vectors: np.ndarray, weights: np.ndarray | None) -> PartialSums:
    """Assigns the rows of one chunk and adds them up by centroid."""
    vectors_ND = torch.from_numpy(np.ascontiguousarray(vectors)).float()
    found = assigner(vectors_ND)
    order = torch.argsort(found.labels, stable=True)
    rows_of_cluster = torch.bincount(found.labels, minlength=assigner.clusters)
    starts = torch.cumsum(rows_of_cluster, 0) - rows_of_cluster
    weight = None if weights is None else torch.from_numpy(np.asarray(weights, dtype=np.float32))
    sums = torch.nn.functional.embedding_bag(
        order, vectors_ND, starts, mode="sum", per_sample_weights=None if weight is None else weight[order]
    )
    if weight is None:
        counts, cosine = rows_of_cluster.double(), found.cosine.double().sum()
    else:
        counts = torch.bincount(found.labels, weight.double(), minlength=assigner.clusters)
        cosine = (found.cosine.double() * weight).sum()
    return PartialSums(counts.numpy(), sums.double().numpy(), float(cosine))


def fit(rows: Rows, settings: FitSettings) -> Fit:
    """Spherical k-means of `rows`; at most as many clusters as there are rows."""
    total = sum(rows.chunk_rows)
    clusters = min(settings.clusters, total)
    random = np.random.default_rng(settings.seed)
    head, head_weights = rows.head(min(total, max(16 * clusters, 2048)))
    centroids = seed_centroids(head, head_weights, clusters, random)
    history: list[float] = []
    merged = None
    every = len(rows.chunk_rows)
    for _ in range(settings.iterations):
        merged = _merge(rows.partial_sums(centroids, every, settings.dtype))
        history.append(merged.cosine / merged.counts.sum())
        centroids = _update(centroids, merged, random)
        if len(history) > 1 and history[-1] - history[-2] < settings.tolerance * abs(history[-2]):
            break
    assert merged is not None
    return Fit(centroids, merged.counts, history[-1], history)


def _merge(parts: Sequence[PartialSums]) -> PartialSums:
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    return merged


def _update(centroids: np.ndarray, merged: PartialSums, random: np.random.Generator) -> np.ndarray:
    """Unit means of the rows; centroids that (almost) nobody chose move beside those that most chose."""
    lengths = np.linalg.norm(merged.sums, axis=1, keepdims=True)
    moved = np.where(lengths > 1e-12, merged.sums / np.maximum(lengths, 1e-12), centroids)
    tiny = np.flatnonzero(merged.counts < _TINY * merged.counts.mean())
    heaviest = np.argsort(-merged.counts, kind="stable")
    for place, donor in zip(tiny, heaviest[: len(tiny)], strict=False):
        noise = random.standard_normal(moved.shape[1])
        moved[place] = moved[donor] + 0.05 * noise / np.linalg.norm(noise)
        moved[place] /= np.linalg.norm(moved[place])
    return np.ascontiguousarray(moved, dtype=np.float32)
