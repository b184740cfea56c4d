"""Sample that a fit sees: uniform over each partition, the same whatever the workers, drawn in one streaming pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.cells import Cells
from clusterbatch.clustering.embedded_corpus import EmbeddedRows
from clusterbatch.clustering.features import Features, feature_sides, feature_vectors, swapped
from clusterbatch.clustering.model import KMeansClusters, PartitionAssigner
from clusterbatch.clustering.partial_sums import Chunk
from clusterbatch.clustering.warm_start import Previous, PreviousAssigner
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import TaskUnit, vector_column, vector_values
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.shuffle import read_bucket, read_buckets, write_buckets


@dataclass(frozen=True)
class SampledChunk:
    """A chunk of the sample, and the (n,) int64 clusters of its rows in the generation before, -1 for none.

    previous: empty if there is no generation before.
    """

    chunk: Chunk
    previous: np.ndarray


@dataclass(frozen=True)
class SampleChunks:
    """The chunks of a stored sample, one a bucket. Picklable. weighted: whether the rows' weights are read."""

    artifact: Artifact
    parts: Sequence[Part]
    features: Features
    weighted: bool = True

    def read(self, bucket: int) -> Chunk:
        """Return vectors (n, D) float16 and weights (n,) or None, in hash order; with both orders, each row twice."""
        return self._chunk(read_bucket(self.artifact, self.parts, bucket))

    def read_all(self, buckets: range) -> list[SampledChunk]:
        """Return the chunks of all `buckets`, in as many requests as for one."""
        tables = read_buckets(self.artifact, self.parts, buckets)
        return [SampledChunk(self._chunk(table), self._previous(table)) for table in tables]

    def _chunk(self, table: pa.Table | None) -> Chunk:
        if table is None:
            return np.empty((0, 0), np.float16), None
        table = _in_order(table)
        vectors = vector_values(table["vector"])
        weights = table["weight"].to_numpy() if self.weighted and "weight" in table.column_names else None
        if self.features == "both_orders":
            vectors = np.stack([vectors, swapped(vectors)], axis=1).reshape(-1, vectors.shape[1])
            weights = None if weights is None else np.repeat(weights, 2)
        return vectors, weights

    def _previous(self, table: pa.Table | None) -> np.ndarray:
        if table is None or "previous" not in table.column_names:
            return np.empty(0, np.int64)
        numbers = _in_order(table)["previous"].to_numpy()
        return np.repeat(numbers, 2) if self.features == "both_orders" else numbers


def _in_order(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.argsort(table["position"].to_numpy(), kind="stable")))


class SampleWorker:
    """Keep the rows whose hash is below their cell's share; write them bucketed by chunk.

    above: the fits of the coarse level if the cells are those of the second one, otherwise without any; previous: the
    generation before, whose cluster numbers go with the rows of the partitions that continue it.
    """

    def __init__(
        self, rows: EmbeddedRows, cells: Cells, above: KMeansClusters, previous: Previous | None, weighted: bool
    ) -> None:
        self._corpus, self._vectors, self._partitions = rows.corpus, rows.vectors(), rows.partitions
        self._features: Features = rows.config.cluster.features
        self._seed = rows.config.cluster.seed
        self._cells = cells
        self._columns = ["pair_id", "source", *(["weight"] if weighted else [])]
        self._first_cell = cells.first_of_partition(len(rows.partitions.names))
        self._coarse = {
            partition: PartitionAssigner(model)
            for partition, model in above.models.items()
            if self._first_cell[partition] >= 0
        }
        self._previous = PreviousAssigner(previous, previous.held(rows.partitions)) if previous else None

    def process(self, item: WorkItem, output: Artifact) -> Result:
        picked = [self._pick(unit) for unit in item.payload]
        buckets = np.concatenate([bucket for bucket, _ in picked])
        table = pa.concat_tables([rows for _, rows in picked])
        part = write_buckets(output, item.number, table, buckets, self._cells.buckets)
        not_sampled = {"not sampled": item.rows - len(buckets)}
        return Result([part], Counts(read=item.rows, written=len(buckets), set_aside=not_sampled))

    def _pick(self, unit: TaskUnit) -> tuple[np.ndarray, pa.Table]:
        """Return (n,) int64 buckets of the rows of a unit that are sampled, and what is stored of them."""
        rows = read_row_group(self._corpus, unit.unit, self._columns)
        partition = self._partitions.of_rows(rows["source"])
        first_cell = self._first_cell[partition]
        share = np.where(first_cell >= 0, self._cells.share[first_cell], 0.0)
        # Another seed than that of the order inside clusters: a sample should not be the head of every cluster.
        position = row_hashes(rows["pair_id"], self._seed + 1) / 2.0**64
        kept = np.flatnonzero(position < share)
        values = feature_vectors(self._vectors.read(unit, feature_sides(self._features), kept), self._features)
        coarse = self._coarse_of(partition[kept], values)
        cell = first_cell[kept] + coarse
        chunks = self._cells.chunks[cell]
        chunk = np.minimum((position[kept] / share[kept] * chunks).astype(np.int64), chunks - 1)
        columns: dict[str, Any] = {"position": position[kept], "vector": vector_column(values.astype(np.float16))}
        if self._previous is not None:
            found = self._previous(unit, partition[kept], kept)
            columns["previous"] = self._previous.in_cells(found, partition[kept], coarse if self._coarse else None)
        if "weight" in self._columns:
            columns["weight"] = rows["weight"].take(pa.array(kept))
        return self._cells.first_bucket[cell] + chunk, pa.table(columns)

    def _coarse_of(self, partition: np.ndarray, values: np.ndarray) -> np.ndarray:
        coarse = np.zeros(len(partition), np.int64)
        for number, assigner in self._coarse.items():
            rows = np.flatnonzero(partition == number)
            if len(rows):
                coarse[rows], _ = assigner(values[rows])
        return coarse
