"""Feature vectors used for clustering: the query's vector, the document's, or both; whole or projected."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.embedding.vectors import Side, vector_values

Features = Literal["query", "document", "both", "both_orders"]


def feature_sides(features: Features) -> list[Side]:
    """The sides whose vectors are read, in their order within a row."""
    if features == "query" or features == "document":
        return [features]
    return ["query", "document"]


def feature_vectors(table: pa.Table, features: Features) -> np.ndarray:
    """(rows, D) float32 of unit length; of two sides the query's is first, D is twice the model's."""
    columns = [vector_values(table[f"{side}_vector"]).astype(np.float32) for side in feature_sides(features)]
    return unit_length(np.concatenate(columns, axis=1))


def swapped(vectors: np.ndarray) -> np.ndarray:
    """(n, D) rows [document; query] of rows [query; document]."""
    return np.roll(vectors, vectors.shape[1] // 2, axis=1)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """(..., D) vectors divided by their norms; a vector of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def projection(sample: np.ndarray, dimensions: int, reduction: Literal["pca", "random"], seed: int) -> np.ndarray:
    """(D, dimensions) float32 with orthonormal columns, for samples of (n, D).

    pca: the directions that hold most of the sample's second moment, not centred, since it is cosines that are to be
    kept. random: any directions; needs no sample but more dimensions.
    """
    width = sample.shape[1]
    if reduction == "random":
        gaussian = np.random.default_rng(seed).standard_normal((width, dimensions))
        return np.linalg.qr(gaussian)[0].astype(np.float32)
    moment = sample.T.astype(np.float64) @ sample.astype(np.float64)
    _, directions = np.linalg.eigh(moment)
    return np.ascontiguousarray(directions[:, ::-1][:, :dimensions], dtype=np.float32)


def project(vectors: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """(n, D) vectors times (D, d) as unit vectors, float32; as they are without a matrix."""
    return vectors if matrix is None else unit_length(vectors.astype(np.float32) @ matrix)
