"""The sample that a fit sees: uniform over each group, the same whatever the workers, in one streaming pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.cells import Cells
from clusterbatch.clustering.features import Features, feature_sides, feature_vectors
from clusterbatch.clustering.groups import Groups, row_hashes
from clusterbatch.clustering.models import GroupAssigner
from clusterbatch.clustering.previous import Previous, PreviousAssigner
from clusterbatch.clustering.stored import StoredModels
from clusterbatch.clustering.tasks import TaskUnit
from clusterbatch.clustering.vectors import VectorSource, vector_column
from clusterbatch.config import RunConfig
from clusterbatch.corpus.units import read_unit
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.exchange import write_buckets
from clusterbatch.store.workspace import Workspace


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
        rows = read_unit(self._corpus, item.unit, self._columns)
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
