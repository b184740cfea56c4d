"""Clusters that the user has already: one for each value of the corpus' column `group` in a source.

Their centroids are computed all the same: for the order in which neighbours are packed, and for statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_sides, feature_vectors, unit_length
from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.models import GroupModel
from clusterbatch.clustering.packing import packing_order
from clusterbatch.clustering.sums import Centers
from clusterbatch.clustering.tasks import TaskUnit
from clusterbatch.clustering.vectors import VectorSource, vector_column, vector_values
from clusterbatch.config import RunConfig
from clusterbatch.corpus.units import read_unit
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import read_bucket, write_buckets
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace

# The corpus' column with the user's own clusters.
LABEL = "group"


class LabelSumsWorker:
    """Adds up the vectors of each (group, label) in a task; writes the sums bucketed by group."""

    def __init__(self, config: RunConfig, generation: int, output: Artifact, fingerprint: str, groups: Groups) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._output, self._fingerprint, self._groups = output, fingerprint, groups
        self._features: Features = config.cluster.features

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        sums = [self._sums(item) for item in unit.payload]
        group = np.concatenate([numbers for numbers, _ in sums])
        table = pa.concat_tables([rows for _, rows in sums])
        part = write_buckets(self._output, unit.number, table, group, len(self._groups.names))
        counts = Counts(read=unit.rows, written=unit.rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=[part], counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt

    def _sums(self, item: TaskUnit) -> tuple[np.ndarray, pa.Table]:
        rows = read_unit(self._corpus, item.unit, ["source", LABEL])
        vectors = feature_vectors(self._vectors.read(item, feature_sides(self._features)), self._features)
        label, names = _encoded(rows[LABEL])
        key = self._groups.of_rows(rows["source"]) * len(names) + label
        present, place, counts = np.unique(key, return_inverse=True, return_counts=True)
        sums = np.zeros((len(present), vectors.shape[1]), np.float64)
        np.add.at(sums, place, vectors)
        table = pa.table(
            {"label": names.take(pa.array(present % len(names))), "rows": counts, "sum": vector_column(sums)}
        )
        return present // len(names), table


class LabelFitWorker:
    """Brings a group's labels and their centroids into packing order."""

    def __init__(
        self, sums: Artifact, sums_parts: Sequence[Part], output: Artifact, fingerprint: str, groups: Groups
    ) -> None:
        self._sums, self._sums_parts = sums, sums_parts
        self._output, self._fingerprint, self._groups = output, fingerprint, groups

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        table = read_bucket(self._sums, self._sums_parts, unit.number)
        assert table is not None, "every group has rows"
        label, names = _encoded(table["label"])
        rows = np.bincount(label, table["rows"].to_numpy())
        values = vector_values(table["sum"])
        sums = np.zeros((len(names), values.shape[1]))
        np.add.at(sums, label, values)
        centroids = unit_length(sums).astype(np.float32)
        order = packing_order(centroids, rows)
        columns = {
            "label": names.take(pa.array(order)),
            "centroid": vector_column(centroids[order]),
            "rows": rows[order].astype(np.int64),
        }
        part = write_parquet(
            self._output,
            f"labels-{unit.number:05d}",
            pa.table(columns),
            content="labels",
            group=self._groups.names[unit.number],
            # The length of unit vectors' mean is their mean cosine to its direction.
            mean_cosine=float(np.linalg.norm(sums, axis=1).sum() / rows.sum()),
        )
        counts = Counts(read=int(rows.sum()), written=int(rows.sum()))
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=[part], counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt


def read_label_models(fitted: Artifact, parts: Sequence[Part], groups: Groups) -> dict[int, GroupModel]:
    """By group: a cluster for each label."""
    numbers = {name: number for number, name in enumerate(groups.names)}
    models = {}
    for part in parts:
        table = read_parquet(fitted.folder, part.path)
        rows = table["rows"].to_numpy()
        models[numbers[part.details["group"]]] = GroupModel(
            fine=[Centers(vector_values(table["centroid"]))],
            shares=rows / rows.sum(),
            labels=table["label"].combine_chunks(),
        )
    return models


def _encoded(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(rows,) numbers of labels, and the labels by number; rows without one share the label null."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary
