"""The chunks of a sample, as a fit reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, swapped
from clusterbatch.clustering.sums import Chunk
from clusterbatch.clustering.vectors import vector_values
from clusterbatch.store import Artifact, Part
from clusterbatch.store.exchange import read_bucket


@dataclass(frozen=True)
class SampleChunks:
    """Where the chunks of a sample lie. Picklable."""

    artifact: Artifact
    parts: Sequence[Part]
    features: Features

    def read(self, bucket: int) -> Chunk:
        """Vectors (n, D) float16 and weights (n,) or None, in hash order; with both orders every row comes twice."""
        table = read_bucket(self.artifact, self.parts, bucket)
        if table is None:
            return np.empty((0, 0), np.float16), None
        table = _in_order(table)
        vectors = vector_values(table["vector"])
        weights = table["weight"].to_numpy() if "weight" in table.column_names else None
        if self.features == "both_orders":
            vectors = np.stack([vectors, swapped(vectors)], axis=1).reshape(-1, vectors.shape[1])
            weights = None if weights is None else np.repeat(weights, 2)
        return vectors, weights

    def previous(self, bucket: int) -> np.ndarray:
        """(n,) int64 for the rows of `read`: the number that each had in the generation before, -1 for none."""
        table = read_bucket(self.artifact, self.parts, bucket)
        if table is None:
            return np.empty(0, np.int64)
        numbers = _in_order(table)["previous"].to_numpy()
        return np.repeat(numbers, 2) if self.features == "both_orders" else numbers


def _in_order(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.argsort(table["position"].to_numpy(), kind="stable")))
