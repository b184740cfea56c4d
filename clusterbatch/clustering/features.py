"""What of a row is clustered: the query's vector, the document's, or both."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

Features = Literal["query", "document", "both"]


def vectors_of(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """(rows, dimensions) of a column of fixed-size lists, in its own number type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def feature_columns(features: Features) -> list[str]:
    return {
        "query": ["query_vector"],
        "document": ["document_vector"],
        "both": ["query_vector", "document_vector"],
    }[features]


def feature_vectors(table: pa.Table, features: Features) -> np.ndarray:
    """(rows, D) float32 of unit length; with `both` query and document side by side, D twice the model's."""
    columns = [vectors_of(table[name]).astype(np.float32) for name in feature_columns(features)]
    vectors = np.concatenate(columns, axis=1)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
