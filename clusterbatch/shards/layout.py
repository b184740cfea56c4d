"""The surrogate's vectors as shards keep them for masks: as they are, in 8 bits, or in fewer dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import project, projection
from clusterbatch.embedding.vectors import SIDES, vector_column, vector_values
from clusterbatch.schema import training_schema, vectors_type


@dataclass(frozen=True)
class SurrogateLayout:
    """dimensions: of a stored vector; kind: int8 stores each vector with a scale of its own."""

    dimensions: int
    kind: Literal["float16", "int8"]

    @property
    def schema(self) -> pa.Schema:
        value = pa.int8() if self.kind == "int8" else pa.float16()
        fields = [pa.field(f"{side}_vector", vectors_type(self.dimensions, value), nullable=False) for side in SIDES]
        if self.kind == "int8":
            fields += [pa.field(f"{side}_scale", pa.float32(), nullable=False) for side in SIDES]
        return pa.schema(fields)

    def decode(self, stored: pa.RecordBatch) -> list[pa.Array]:
        """query_vector and document_vector as float16 columns."""
        columns = [stored.column(f"{side}_vector") for side in SIDES]
        if self.kind == "float16":
            return columns
        scales = [stored.column(f"{side}_scale").to_numpy() for side in SIDES]
        return [
            vector_column((vector_values(column) * scale[:, None]).astype(np.float16))
            for column, scale in zip(columns, scales, strict=True)
        ]


class SurrogateEncoder:
    """Turns full vectors into stored ones. The projection, if any, follows from the seed alone."""

    def __init__(self, layout: SurrogateLayout, seed: int) -> None:
        self._layout, self._seed = layout, seed

    def encode(self, table: pa.Table) -> pa.RecordBatch:
        """The columns of the layout's schema, from query_vector and document_vector (any float type)."""
        columns: dict[str, pa.Array] = {}
        for side in SIDES:
            vectors = vector_values(table[f"{side}_vector"])
            if self._layout.dimensions < vectors.shape[1]:
                basis = np.empty((0, vectors.shape[1]))
                vectors = project(vectors, projection(basis, self._layout.dimensions, "random", self._seed))
            if self._layout.kind == "int8":
                values, scale = quantise(vectors)
                columns |= {f"{side}_vector": vector_column(values), f"{side}_scale": pa.array(scale)}
            else:
                columns[f"{side}_vector"] = vector_column(vectors.astype(np.float16))
        return pa.RecordBatch.from_arrays(
            [columns[name] for name in self._layout.schema.names], schema=self._layout.schema
        )


def squared_errors(layout: SurrogateLayout, stored: pa.RecordBatch, table: pa.Table) -> np.ndarray:
    """(n - 1,): squared error of the stored cosine between each row's query and the next row's document.

    Rows are sorted by cluster, so this is what masks compare: rows that stand in one batch.
    """
    query, document = (vector_values(column).astype(np.float32) for column in layout.decode(stored))
    kept = np.einsum("nd,nd->n", query[:-1], document[1:])
    query, document = (vector_values(table[f"{side}_vector"]).astype(np.float32) for side in SIDES)
    return (kept - np.einsum("nd,nd->n", query[:-1], document[1:])) ** 2


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) int8 and (N,) float32 scale: the largest component of each vector becomes 127."""
    vectors = vectors.astype(np.float32)
    scale = np.maximum(np.abs(vectors).max(axis=1), 1e-12) / 127
    return np.round(vectors / scale[:, None]).astype(np.int8), scale


# What a part holds, in its details under "content".
TRAINING, VECTORS, RUNS, ROWS, INDEX = "training", "vectors", "runs", "rows", "index"


@dataclass(frozen=True)
class ShardLayout:
    """What the columns of all shards of one artifact are; kept in its manifest.

    surrogate_dimensions: width of the stored vectors, None where they are left out; surrogate: how they are stored.
    """

    vocabulary: int
    run_rows: int
    surrogate_dimensions: int | None = None
    surrogate: Literal["float16", "int8"] = "float16"
    negatives: bool = False
    weight: bool = False
    # Sides that are images.
    images: Sequence[str] = ()
    # Whether each negative has its margin to the positive beside it, by the surrogate.
    margins: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Columns of the training file."""
        return training_schema(
            self.vocabulary,
            negatives=self.negatives,
            weight=self.weight,
            images=self.images,
            margins=self.margins,
        )

    @property
    def vectors(self) -> SurrogateLayout | None:
        """Columns of the vectors file."""
        if not self.surrogate_dimensions:
            return None
        return SurrogateLayout(self.surrogate_dimensions, self.surrogate)
