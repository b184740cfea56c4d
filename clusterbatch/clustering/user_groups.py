"""The user's own clusters: one for each value of the corpus' column `group` in a partition.

Their centroids are computed all the same: for the order in which neighbours are packed, and for statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.clustering.embedded_corpus import EmbeddedCorpus, EmbeddedRows, PassFactory
from clusterbatch.clustering.features import Features, feature_sides, feature_vectors, unit_length
from clusterbatch.clustering.model import (
    CentroidClusters,
    NamedFit,
    Numbered,
    PartitionModel,
    StoredParts,
    UnitRows,
    read_fits,
    stored_fits,
    write_fits,
)
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partial_sums import Centers
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import TaskUnit, vector_column, vector_values
from clusterbatch.errors import UsageError
from clusterbatch.runtime import Result, WorkItem, bundle_items
from clusterbatch.store import Artifact, Counts
from clusterbatch.store.details import FitPart
from clusterbatch.store.shuffle import iterate_bucket, read_buckets, write_buckets

# The corpus' column with the user's own clusters.
LABEL = "group"
# (partition, label), or a label alone.
_Key = Any


@dataclass(frozen=True)
class UserGroupClusters(CentroidClusters):
    """Clusters by label: a row belongs to the cluster of its label, and null is a label, too."""

    partitions: Partitions
    features: Features
    stored: Sequence[StoredParts]

    @cached_property
    def models(self) -> Mapping[int, PartitionModel]:
        models = {}
        for partition, table in self._tables.items():
            rows = table["rows"].to_numpy()
            models[partition] = PartitionModel([Centers(vector_values(table["centroid"]))], rows / rows.sum())
        return models

    def clusters_of(self, partition: int, values: np.ndarray, rows: UnitRows, places: np.ndarray) -> Numbered:
        labels = rows.table[LABEL].take(pa.array(places))
        cluster = pc.index_in(labels, self._labels[partition]).to_numpy().astype(np.int64)
        return cluster, self.models[partition].cosine(values, cluster)

    @cached_property
    def _labels(self) -> dict[int, pa.Array]:
        return {partition: table["label"].combine_chunks() for partition, table in self._tables.items()}

    @cached_property
    def _tables(self) -> dict[int, pa.Table]:
        numbers = {name: number for number, name in enumerate(self.partitions.names)}
        return {
            numbers[details["group"]]: table
            for stored in self.stored
            for details, table in read_fits(stored, stored_fits(stored.parts))
        }


def fit_user_groups(corpus: EmbeddedCorpus, passes: PassFactory) -> UserGroupClusters:
    """Sum up the vectors of each label, then order the labels of each partition.

    Raises UsageError if the corpus has no column `group`.
    """
    if LABEL not in corpus.columns:
        raise UsageError("clusters by group: the corpus has no such column (set corpus.columns.group and re-ingest)")
    sums = passes.run("sums", corpus.items, LabelSumsWorker, {"rows": corpus.rows}, corpus.reading_pool)
    partitions = corpus.partitions
    items = bundle_items(partitions.rows, sum(part.bytes for part in sums.parts))
    fitted = passes.run("fit", items, LabelFitWorker, {"sums": sums, "partitions": partitions}, corpus.pool)
    return UserGroupClusters(partitions, corpus.config.cluster.features, [fitted])


class LabelSumsWorker:
    """Add up the vectors of each (partition, label) in a task; write the sums bucketed by partition."""

    def __init__(self, rows: EmbeddedRows) -> None:
        self._corpus, self._vectors, self._partitions = rows.corpus, rows.vectors(), rows.partitions
        self._features: Features = rows.config.cluster.features

    def process(self, item: WorkItem, output: Artifact) -> Result:
        found = _Sums()
        for unit in item.payload:
            # All rows of a unit may have been deleted from the corpus.
            if unit.unit.rows:
                self._add(unit, found)
        parts = []
        if found.keys:
            partitions, labels = zip(*found.keys, strict=True)
            columns = {"label": pa.array(labels, pa.string()), "rows": found.rows, "sum": vector_column(found.sums)}
            buckets = len(self._partitions.names)
            parts.append(write_buckets(output, item.number, pa.table(columns), np.array(partitions), buckets))
        return Result(parts, Counts(read=item.rows, written=item.rows))

    def _add(self, unit: TaskUnit, found: _Sums) -> None:
        rows = read_row_group(self._corpus, unit.unit, ["source", LABEL])
        vectors = feature_vectors(self._vectors.read(unit, feature_sides(self._features)), self._features)
        # Rows without a label share the label null.
        encoded = rows[LABEL].combine_chunks().dictionary_encode(null_encoding="encode")
        names = encoded.dictionary.to_pylist()
        key = self._partitions.of_rows(rows["source"]) * len(names) + encoded.indices.to_numpy(zero_copy_only=False)
        present, place, counts = np.unique(key, return_inverse=True, return_counts=True)
        sums = np.zeros((len(present), vectors.shape[1]))
        np.add.at(sums, place, vectors)
        found.add([(number // len(names), names[number % len(names)]) for number in present.tolist()], counts, sums)


class LabelFitWorker:
    """Bring the labels of the item's partitions and their centroids into packing order."""

    def __init__(self, sums: StoredParts, partitions: Partitions) -> None:
        self._sums, self._partitions = sums, partitions

    def process(self, item: WorkItem, output: Artifact) -> Result:
        partitions: range = item.payload
        artifact, parts = self._sums.artifact, self._sums.parts
        fits: list[NamedFit] = []
        if len(partitions) == 1:
            # Task by task: together their sums would take as much memory as tasks times labels.
            fits.append(self._fit(partitions.start, iterate_bucket(artifact, parts, partitions.start)))
        else:
            for partition, table in zip(partitions, read_buckets(artifact, parts, partitions), strict=True):
                fits.append(self._fit(partition, [] if table is None else [table]))
        rows = int(self._partitions.rows[partitions.start : partitions.stop].sum())
        return Result(write_fits(output, item.number, fits), Counts(read=rows, written=rows))

    def _fit(self, partition: int, tables: Iterable[pa.Table]) -> NamedFit:
        found = _Sums()
        for table in tables:
            found.add(table["label"].to_pylist(), table["rows"].to_numpy(), vector_values(table["sum"]))
        centroids = unit_length(found.sums).astype(np.float32)
        order = packing_order(centroids, found.rows)
        columns = {
            "label": pa.array(found.keys, pa.string()).take(pa.array(order)),
            "centroid": vector_column(centroids[order]),
            "rows": found.rows[order],
        }
        details = FitPart(
            content="labels",
            group=self._partitions.names[partition],
            # The length of unit vectors' mean is their mean cosine to its direction.
            mean_cosine=float(np.linalg.norm(found.sums, axis=1).sum() / found.rows.sum()),
        )
        return details, pa.table(columns)


class _Sums:
    """Rows and sums of vectors by key, added up as they come: holds no more than keys times dimensions."""

    def __init__(self) -> None:
        self._place: dict[_Key, int] = {}
        self.rows, self.sums = np.zeros(0, np.int64), np.zeros((0, 0))

    @property
    def keys(self) -> list[_Key]:
        """Keys in the order in which they first came."""
        return list(self._place)

    def add(self, keys: Sequence[_Key], rows: np.ndarray, values: np.ndarray) -> None:
        """Add `rows` (n,) of each key and the sums (n, D) of their vectors; a key may come several times."""
        places = np.array([self._place.setdefault(key, len(self._place)) for key in keys], np.int64)
        more = len(self._place) - len(self.rows)
        self.rows = np.concatenate([self.rows, np.zeros(more, np.int64)])
        sums = self.sums.reshape(len(self.sums), values.shape[1])
        self.sums = np.concatenate([sums, np.zeros((more, values.shape[1]))]) if more else sums
        np.add.at(self.rows, places, rows)
        np.add.at(self.sums, places, values)
