"""The sample that a fit sees: uniform over each group, the same whatever the workers, in one streaming pass.

The chunks of a sample, as a fit reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_sides, feature_vectors, swapped
from clusterbatch.clustering.model import GroupAssigner, StoredModels
from clusterbatch.clustering.partial_sums import Chunk
from clusterbatch.clustering.partitions import Cells
from clusterbatch.clustering.warm_start import Previous, PreviousAssigner
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import TaskUnit, VectorSource, vector_column, vector_values
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import read_bucket, write_buckets
from clusterbatch.store.workspace import Workspace


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


class SampleWorker:
    """Keeps the rows whose hash is below their cell's share; writes them bucketed by chunk.

    coarse: the fits of the first level, when the cells are those of the second; previous: the generation before, whose
    numbers go with the rows of the groups that it holds.
    """

    def __init__(
        self,
        config: RunConfig,
        generation: int,
        output: Artifact,
        fingerprint: str,
        groups: Groups,
        cells: Cells,
        weighted: bool,
        coarse: StoredModels | None = None,
        previous: Previous | None = None,
    ) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._output, self._fingerprint = output, fingerprint
        self._groups, self._cells = groups, cells
        self._columns = ["pair_id", "source", *(["weight"] if weighted else [])]
        self._features: Features = config.cluster.features
        self._seed = config.cluster.seed
        self._first_cell = cells.first_of_group(len(groups.names))
        models = coarse.load() if coarse else {}
        self._coarse = {group: GroupAssigner(model) for group, model in models.items() if self._first_cell[group] >= 0}
        self._previous = PreviousAssigner(previous, previous.held(groups)) if previous else None

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        picked = [self._pick(item) for item in unit.payload]
        buckets = np.concatenate([bucket for bucket, _ in picked])
        table = pa.concat_tables([rows for _, rows in picked])
        part = write_buckets(self._output, unit.number, table, buckets, self._cells.buckets)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=unit.rows, written=len(buckets), set_aside={"not sampled": unit.rows - len(buckets)}),
            seconds=watch.seconds,
        )
        self._output.write_receipt(receipt)
        return receipt

    def _pick(self, item: TaskUnit) -> tuple[np.ndarray, pa.Table]:
        rows = read_row_group(self._corpus, item.unit, self._columns)
        group = self._groups.of_rows(rows["source"])
        first_cell = self._first_cell[group]
        share = np.where(first_cell >= 0, self._cells.share[first_cell], 0.0)
        # Another seed than the order inside clusters has: a sample should not be the head of every cluster.
        position = row_hashes(rows["pair_id"], self._seed + 1) / 2.0**64
        kept = np.flatnonzero(position < share)
        values = feature_vectors(self._vectors.read(item, feature_sides(self._features), kept), self._features)
        coarse = self._coarse_of(group[kept], values)
        cell = first_cell[kept] + coarse
        chunks = self._cells.chunks[cell]
        chunk = np.minimum((position[kept] / share[kept] * chunks).astype(np.int64), chunks - 1)
        columns: dict[str, Any] = {"position": position[kept], "vector": vector_column(values.astype(np.float16))}
        if self._previous is not None:
            found = self._previous(item, group[kept], kept)
            columns["previous"] = self._previous.in_cells(found, group[kept], coarse if self._coarse else None)
        if "weight" in self._columns:
            columns["weight"] = rows["weight"].take(pa.array(kept))
        return self._cells.first_bucket[cell] + chunk, pa.table(columns)

    def _coarse_of(self, group: np.ndarray, values: np.ndarray) -> np.ndarray:
        coarse = np.zeros(len(group), np.int64)
        for number, assigner in self._coarse.items():
            rows = np.flatnonzero(group == number)
            if len(rows):
                coarse[rows], _ = assigner(values[rows])
        return coarse
