"""Schema of shards: columns of the training file, and the surrogate's vectors as they are stored for masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import project, projection
from clusterbatch.embedding.vectors import SIDES, vector_column, vector_values
from clusterbatch.schema import training_schema, vectors_type

# Content of a shard's parts, in their details under "content"; INDEX is the cluster index of all shards.
TRAINING, VECTORS, RUNS, ROWS, INDEX = "training", "vectors", "runs", "rows", "index"
# Content of a part with a teacher's scores, and of a shard's part with the scores that came with the corpus.
SCORES, PAIR_SCORES = "scores", "pair_scores"
# Rows whose vectors are worked on at once: those of a whole bucket in float32 would be several times its bytes.
_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class ShardSchema:
    """Columns of all shards of one artifact; kept in its manifest.

    surrogate_dimensions: width of the stored vectors, None if there are none; surrogate: how they are stored; images:
    sides that are images; margins: whether each negative has its margin to the positive beside it, by the surrogate;
    document_id: whether rows say of which document they are a part; score, negative_scores: whether pairs, and their
    negatives, have scores that came with the corpus; duplicates: whether rows have a group of semantic duplicates.
    """

    vocabulary: int
    run_rows: int
    surrogate_dimensions: int | None = None
    surrogate: Literal["float16", "int8"] = "float16"
    negatives: bool = False
    weight: bool = False
    images: Sequence[str] = ()
    margins: bool = False
    document_id: bool = False
    score: bool = False
    negative_scores: bool = False
    duplicates: bool = False

    @property
    def training(self) -> pa.Schema:
        """Columns of the training file."""
        return training_schema(
            self.vocabulary,
            negatives=self.negatives,
            weight=self.weight,
            images=self.images,
            margins=self.margins,
            document_id=self.document_id,
            score=self.score,
            negative_scores=self.negative_scores,
            duplicates=self.duplicates,
        )

    @property
    def vectors(self) -> VectorFormat | None:
        """Columns of the vectors file; None if there is none."""
        if not self.surrogate_dimensions:
            return None
        return VectorFormat(self.surrogate_dimensions, self.surrogate)


@dataclass(frozen=True)
class VectorFormat:
    """Stored vectors. dimensions: of each; kind: int8 stores each vector with a scale of its own."""

    dimensions: int
    kind: Literal["float16", "int8"]

    @property
    def schema(self) -> pa.Schema:
        value = pa.int8() if self.kind == "int8" else pa.float16()
        fields = [pa.field(f"{side}_vector", vectors_type(self.dimensions, value), nullable=False) for side in SIDES]
        if self.kind == "int8":
            fields += [pa.field(f"{side}_scale", pa.float32(), nullable=False) for side in SIDES]
        return pa.schema(fields)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's two vectors, with their scales."""
        return 2 * (self.dimensions + 4 if self.kind == "int8" else 2 * self.dimensions)

    def decode(self, stored: pa.RecordBatch) -> list[pa.Array]:
        """Return query_vector and document_vector as float16 columns."""
        columns = [stored.column(f"{side}_vector") for side in SIDES]
        if self.kind == "float16":
            return columns
        scales = [stored.column(f"{side}_scale").to_numpy() for side in SIDES]
        return [
            vector_column((vector_values(column) * scale[:, None]).astype(np.float16))
            for column, scale in zip(columns, scales, strict=True)
        ]


class VectorEncoder:
    """Turn full vectors into stored ones. The projection, if any, follows from the seed alone."""

    def __init__(self, stored: VectorFormat, seed: int) -> None:
        self._format, self._seed = stored, seed

    def encode(self, table: pa.Table) -> pa.RecordBatch:
        """Return the columns of the format's schema, from query_vector and document_vector (any float type)."""
        kept = self._format
        columns: dict[str, pa.Array] = {}
        for side in SIDES:
            vectors = table[f"{side}_vector"]
            matrix = self._projection(vectors.type.list_size)
            values = np.empty((table.num_rows, kept.dimensions), np.int8 if kept.kind == "int8" else np.float16)
            scale = np.empty(table.num_rows, np.float32)
            for start in range(0, table.num_rows, _BLOCK_ROWS):
                rows = slice(start, start + _BLOCK_ROWS)
                block = project(vector_values(vectors.slice(start, _BLOCK_ROWS)), matrix)
                if kept.kind == "int8":
                    values[rows], scale[rows] = quantise(block)
                else:
                    values[rows] = block
            columns |= {f"{side}_vector": vector_column(values), f"{side}_scale": pa.array(scale)}
        return pa.RecordBatch.from_arrays([columns[name] for name in kept.schema.names], schema=kept.schema)

    def _projection(self, width: int) -> np.ndarray | None:
        """Return the (width, dimensions) matrix that reduces vectors; None if they are stored as wide as they are."""
        if self._format.dimensions >= width:
            return None
        return projection(np.empty((0, width)), self._format.dimensions, "random", self._seed)


def squared_errors(stored_as: VectorFormat, stored: pa.RecordBatch, table: pa.Table) -> np.ndarray:
    """Return (n - 1,) squared errors of the stored cosine between each row's query and the next row's document.

    Rows are sorted by cluster, so these are pairs that masks compare: rows of one batch.
    """
    errors = np.empty(max(0, table.num_rows - 1), np.float32)
    for start in range(0, len(errors), _BLOCK_ROWS):
        # One row more than there are errors: the last query is compared with the document of the block after.
        rows = (start, _BLOCK_ROWS + 1)
        kept = _cosines_of_neighbours(*stored_as.decode(stored.slice(*rows)))
        true = _cosines_of_neighbours(*(table[f"{side}_vector"].slice(*rows) for side in SIDES))
        errors[start : start + _BLOCK_ROWS] = (kept - true) ** 2
    return errors


def _cosines_of_neighbours(query: pa.Array | pa.ChunkedArray, document: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return (n - 1,) float32 products of each query's vector with the next document's."""
    queries, documents = (vector_values(column).astype(np.float32) for column in (query, document))
    return np.einsum("nd,nd->n", queries[:-1], documents[1:])


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, D) int8 and (N,) float32 scales: the largest component of each vector becomes 127."""
    vectors = vectors.astype(np.float32)
    scale = np.maximum(np.abs(vectors).max(axis=1), 1e-12) / 127
    return np.round(vectors / scale[:, None]).astype(np.int8), scale
