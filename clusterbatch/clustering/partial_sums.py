"""Contributions of rows to a round of k-means: mergeable sums, and the places that rows are kept in.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from clusterbatch.clustering.assign import Assigner

# Bins of the histogram of cosines, over [-1, 1].
COSINE_BINS = 2048
COSINE_EDGES = np.linspace(-1, 1, COSINE_BINS + 1)


@dataclass(frozen=True)
class Centers:
    """centroids: (K, D) float32 of unit length; bias: (K,) float32 added to their similarity, None for none."""

    centroids: np.ndarray
    bias: np.ndarray | None = None


@dataclass
class PartialSums:
    """Contribution of a chunk under given centres, mergeable by addition."""

    rows: np.ndarray  # (K,) int64, rows nearest each centroid
    counts: np.ndarray  # (K,) float64, their weight
    sums: np.ndarray  # (K, D) their weighted sum: float32 of a chunk, float64 once merged
    cosine: float  # weighted sum of the rows' cosine to their centroid
    histogram: np.ndarray  # (COSINE_BINS,) int64, rows by cosine

    @property
    def mean_cosine(self) -> float:
        return self.cosine / max(float(self.counts.sum()), 1e-12)

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Return the (n,) cosines that about, and at most, these (n,) shares of the rows lie below.

        They are lower edges of bins: rows that are all alike, in one bin, do not lie below.
        """
        rows = np.cumsum(self.histogram)
        return COSINE_EDGES[np.searchsorted(rows, shares * rows[-1], side="right")]


def merge(parts: Iterable[PartialSums]) -> PartialSums:
    """Their sum, taken in their order: rounding then does not depend on who computed what when."""
    iterator = iter(parts)
    first = next(iterator)
    merged = PartialSums(
        first.rows.copy(), first.counts.copy(), first.sums.astype(np.float64), first.cosine, first.histogram.copy()
    )
    for part in iterator:
        merged.rows += part.rows
        merged.counts += part.counts
        merged.sums += part.sums
        merged.cosine += part.cosine
        merged.histogram += part.histogram
    return merged


def chunk_sums(assigner: Assigner, vectors: np.ndarray, weights: np.ndarray | None) -> PartialSums:
    """Assign the rows of one chunk, (N, D), and add them up by centroid."""
    vectors_ND = torch.from_numpy(np.array(vectors, dtype=np.float32))
    found = assigner(vectors_ND)
    order = torch.argsort(found.labels, stable=True)
    rows_of_cluster = torch.bincount(found.labels, minlength=assigner.clusters)
    starts = torch.cumsum(rows_of_cluster, 0) - rows_of_cluster
    weight = None if weights is None else torch.from_numpy(np.array(weights, dtype=np.float32))
    # Gathers and adds rows cluster by cluster in one vectorised pass.
    sums = torch.nn.functional.embedding_bag(
        order, vectors_ND, starts, mode="sum", per_sample_weights=None if weight is None else weight[order]
    )
    cosine = found.cosine.double()
    if weight is None:
        counts = rows_of_cluster.double()
    else:
        counts = torch.bincount(found.labels, weight.double(), minlength=assigner.clusters)
        cosine = cosine * weight
    bins = ((found.cosine + 1) * (COSINE_BINS / 2)).long().clamp_(0, COSINE_BINS - 1)
    histogram = torch.bincount(bins, minlength=COSINE_BINS)
    return PartialSums(rows_of_cluster.numpy(), counts.numpy(), sums.numpy(), float(cosine.sum()), histogram.numpy())


class Rows(Protocol):
    """Rows of a fit in fixed chunks and random order, wherever they are."""

    @property
    def chunk_rows(self) -> Sequence[int]:
        """Rows of each chunk."""
        ...

    def head(self, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The first `count` vectors, (count, D) float32, and their weights, (count,) or None."""
        ...

    def partial_sums(self, centers: Centers, chunks: Sequence[int], dtype: torch.dtype) -> PartialSums:
        """Merged sums of these chunks, in their order."""
        ...


# Vectors (n, D) of unit length in any float type, and weights (n,) or None.
Chunk = tuple[np.ndarray, np.ndarray | None]


class LocalRows:
    """All chunks in this process."""

    def __init__(self, chunks: Sequence[Chunk], device: str = "cpu") -> None:
        self._chunks = [(vectors, None) for vectors, _ in chunks] if is_weightless(chunks) else chunks
        self._device = device

    @classmethod
    def of(cls, vectors: np.ndarray, weights: np.ndarray | None = None, clusters: int = 1) -> LocalRows:
        """(n, D) float rows in random order already, with (n,) weights, cut as a fit of `clusters` wants them."""
        pieces = np.array_split(np.arange(len(vectors)), min(chunk_count(len(vectors), clusters), len(vectors)))
        edges = [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]
        return cls([(vectors[a:b], None if weights is None else weights[a:b]) for a, b in edges])

    @property
    def chunk_rows(self) -> Sequence[int]:
        return [len(vectors) for vectors, _ in self._chunks]

    def head(self, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        return chunks_head(self._chunks, count)

    def partial_sums(self, centers: Centers, chunks: Sequence[int], dtype: torch.dtype) -> PartialSums:
        assigner = Assigner(centers.centroids, centers.bias, dtype=dtype, device=self._device)
        return merge(chunk_sums(assigner, *self._chunks[chunk]) for chunk in chunks)


def is_weightless(chunks: Iterable[Chunk]) -> bool:
    """Return whether all rows have weight 0. They then count by number: by weight no centroid would move."""
    return all(weights is not None and not weights.any() for vectors, weights in chunks if len(vectors))


def chunks_head(chunks: Iterable[Chunk], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first `count` rows of `chunks` as (count, D) float32, and their weights; nothing beyond them is read."""
    vectors, weights, rows = [], [], 0
    for piece, weight in chunks:
        if not len(piece):
            continue
        vectors.append(piece[: count - rows].astype(np.float32))
        weights.append(None if weight is None else weight[: count - rows])
        rows += len(vectors[-1])
        if rows == count:
            break
    known = [weight for weight in weights if weight is not None]
    return np.concatenate(vectors), np.concatenate(known) if known else None


def chunk_count(rows: int, clusters: int) -> int:
    """Number of chunks that a sample is cut into: a multiple of eight, as first rounds look at an eighth of it.

    Each chunk has several rows per centroid, so that sums are a small part of what they sum up.
    """
    return 8 * max(1, round(rows / (8 * max(4096, 8 * clusters))))
