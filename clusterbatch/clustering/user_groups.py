"""Clusters that the user has already: one for each value of the corpus' column `group` in a source.

Their centroids are computed all the same: for the order in which neighbours are packed, and for statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_sides, feature_vectors, unit_length
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import TaskUnit, VectorSource, vector_column, vector_values
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import iterate_bucket, write_buckets
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace

# The corpus' column with the user's own clusters.
LABEL = "group"
# (group, label), or a label alone.
_Key = Any


class _Sums:
    """Rows and sums of vectors by key, added up as they come: no more is held than keys times dimensions."""

    def __init__(self) -> None:
        self._place: dict[_Key, int] = {}
        self.rows, self.sums = np.zeros(0, np.int64), np.zeros((0, 0))

    @property
    def keys(self) -> list[_Key]:
        """In the order in which they first came."""
        return list(self._place)

    def add(self, keys: Sequence[_Key], rows: np.ndarray, values: np.ndarray) -> None:
        """`rows` (n,) of each key and the sums (n, D) of their vectors; a key may come several times."""
        places = np.array([self._place.setdefault(key, len(self._place)) for key in keys], np.int64)
        more = len(self._place) - len(self.rows)
        self.rows = np.concatenate([self.rows, np.zeros(more, np.int64)])
        sums = self.sums.reshape(len(self.sums), values.shape[1])
        self.sums = np.concatenate([sums, np.zeros((more, values.shape[1]))]) if more else sums
        np.add.at(self.rows, places, rows)
        np.add.at(self.sums, places, values)


class LabelSumsWorker:
    """Adds up the vectors of each (group, label) in a task; writes the sums bucketed by group."""

    def __init__(self, config: RunConfig, generation: int, output: Artifact, fingerprint: str, groups: Groups) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._output, self._fingerprint, self._groups = output, fingerprint, groups
        self._features: Features = config.cluster.features

    def process(self, unit: Unit) -> Receipt:
        watch, found = Stopwatch(), _Sums()
        for item in unit.payload:
            self._add(item, found)
        groups, labels = zip(*found.keys, strict=True)
        table = pa.table({"label": pa.array(labels, pa.string()), "rows": found.rows, "sum": vector_column(found.sums)})
        part = write_buckets(self._output, unit.number, table, np.array(groups), len(self._groups.names))
        counts = Counts(read=unit.rows, written=unit.rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=[part], counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt

    def _add(self, item: TaskUnit, found: _Sums) -> None:
        rows = read_row_group(self._corpus, item.unit, ["source", LABEL])
        vectors = feature_vectors(self._vectors.read(item, feature_sides(self._features)), self._features)
        # Rows without a label share the label null.
        encoded = rows[LABEL].combine_chunks().dictionary_encode(null_encoding="encode")
        names = encoded.dictionary.to_pylist()
        key = self._groups.of_rows(rows["source"]) * len(names) + encoded.indices.to_numpy(zero_copy_only=False)
        present, place, counts = np.unique(key, return_inverse=True, return_counts=True)
        sums = np.zeros((len(present), vectors.shape[1]))
        np.add.at(sums, place, vectors)
        found.add([(number // len(names), names[number % len(names)]) for number in present.tolist()], counts, sums)


class LabelFitWorker:
    """Brings a group's labels and their centroids into packing order."""

    def __init__(
        self, sums: Artifact, sums_parts: Sequence[Part], output: Artifact, fingerprint: str, groups: Groups
    ) -> None:
        self._sums, self._sums_parts = sums, sums_parts
        self._output, self._fingerprint, self._groups = output, fingerprint, groups

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        found = _Sums()
        # Task by task: together their sums would take as much memory as tasks times labels.
        for table in iterate_bucket(self._sums, self._sums_parts, unit.number):
            found.add(table["label"].to_pylist(), table["rows"].to_numpy(), vector_values(table["sum"]))
        centroids = unit_length(found.sums).astype(np.float32)
        order = packing_order(centroids, found.rows)
        columns = {
            "label": pa.array(found.keys, pa.string()).take(pa.array(order)),
            "centroid": vector_column(centroids[order]),
            "rows": found.rows[order],
        }
        part = write_parquet(
            self._output,
            f"labels-{unit.number:05d}",
            pa.table(columns),
            content="labels",
            group=self._groups.names[unit.number],
            # The length of unit vectors' mean is their mean cosine to its direction.
            mean_cosine=float(np.linalg.norm(found.sums, axis=1).sum() / found.rows.sum()),
        )
        rows = int(found.rows.sum())
        counts = Counts(read=rows, written=rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=[part], counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt
