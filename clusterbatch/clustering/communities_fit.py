"""Communities of a corpus: passes that gather rows by partition, search neighbours and cut each partition's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.cells import community_size
from clusterbatch.clustering.communities import communities
from clusterbatch.clustering.embedded_corpus import EmbeddedCorpus, PassFactory
from clusterbatch.clustering.features import Features, feature_vectors, unit_length
from clusterbatch.clustering.model import (
    CentroidClusters,
    FittedClusters,
    KMeansClusters,
    NamedFit,
    Numbered,
    PartitionModel,
    StoredParts,
    UnitRows,
    read_models,
    write_fits,
)
from clusterbatch.clustering.outliers import NO_OUTLIERS
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.runtime import Result, WorkItem, bundle_items
from clusterbatch.search.gather import Block, Gathered, GatherWorker, blocks
from clusterbatch.store import Artifact, Counts
from clusterbatch.store.details import FitPart
from clusterbatch.store.shuffle import iterate_bucket, read_bucket, read_buckets, write_buckets

CENTROIDS, LABELS = "centroids", "labels"


@dataclass(frozen=True)
class CommunityClusters(CentroidClusters):
    """Clusters whose rows are placed already; centroids only describe them.

    stored: the centroids; placed: the community of each row of the partitions that are split, by task.
    """

    partitions: Partitions
    features: Features
    stored: Sequence[StoredParts]
    placed: StoredParts

    @cached_property
    def models(self) -> Mapping[int, PartitionModel]:
        return read_models(self.stored[0], self.partitions)

    def clusters_of(self, partition: int, values: np.ndarray, rows: UnitRows, places: np.ndarray) -> Numbered:
        placed = self._placed_of(rows.task).get(rows.unit.unit.number, np.empty((0, 2), np.int64))
        cluster = np.full(len(rows.partition), -1, np.int64)
        cluster[placed[:, 0]] = placed[:, 1]
        assert (cluster[places] >= 0).all(), "every row of a partition that is split has its community"
        return cluster[places], self.models[partition].cosine(values, cluster[places])

    @cached_property
    def _placed_of(self) -> Callable[[int], dict[int, np.ndarray]]:
        # Kept for the other units and partitions of the task.
        return lru_cache(maxsize=1)(self._read_placed)

    def _read_placed(self, task: int) -> dict[int, np.ndarray]:
        """Return by number of the corpus unit (rows, 2) int64: row of the unit, and cluster inside its partition."""
        table = read_bucket(self.placed.artifact, self.placed.parts, task)
        if table is None:
            return {}
        unit = table["unit"].to_numpy()
        found = np.stack([table[name].to_numpy() for name in ("row", "cluster")], axis=1)
        return {number: found[unit == number] for number in np.unique(unit).tolist()}


def fit_communities(corpus: EmbeddedCorpus, passes: PassFactory) -> FittedClusters:
    """Search the neighbours of all queries, then cut the graph of each partition that is split."""
    config, partitions = corpus.config, corpus.partitions
    features: Features = config.cluster.features
    split = partitions.clusters > 1
    if not split.any():
        return KMeansClusters(partitions, features)
    gathering = {"config": config, "generation": corpus.generation, "partitions": partitions, "texts": False}
    gathered = passes.run("gather", corpus.items, GatherWorker, gathering, corpus.reading_pool)
    searched = [item for item in blocks(gathered.parts, partitions) if split[list(item.payload.partitions)].any()]
    searching = {"ranks": config.cluster.neighbour_ranks, "gathered": gathered, "partitions": partitions}
    neighbours = passes.run("neighbours", searched, NeighboursWorker, searching, corpus.pool)
    cutting = {
        "config": config,
        "partitions": partitions,
        "gathered": gathered,
        "neighbours": neighbours,
        "tasks": len(corpus.items),
    }
    stored = sum(part.bytes for part in (*gathered.parts, *neighbours.parts))
    items = [item for item in bundle_items(partitions.rows, stored) if split[list(item.payload)].any()]
    # The largest first, so that no worker ends long after the others.
    cut = passes.run("communities", sorted(items, key=lambda item: -item.rows), CommunitiesWorker, cutting, corpus.pool)
    centroids, placed = (
        StoredParts(cut.artifact, [part for part in cut.parts if part.details["content"] == content])
        for content in (CENTROIDS, LABELS)
    )
    return CommunityClusters(partitions, features, [centroids], placed)


class NeighboursWorker:
    """Search the queries of a block's partitions that are split; write what is found at the ranks that count."""

    def __init__(self, ranks: tuple[int, int], gathered: StoredParts, partitions: Partitions) -> None:
        torch.set_num_threads(1)
        self._first, self._last = ranks
        self._gathered, self._partitions = Gathered(gathered.artifact, gathered.parts), partitions

    def process(self, item: WorkItem, output: Artifact) -> Result:
        block: Block = item.payload
        numbers, tables = [], []
        for partition, rows in self._gathered.queries(block):
            if self._partitions.clusters[partition] > 1:
                found = self._gathered.search(partition, rows, self._last).ranking.documents[:, self._first :]
                column = vector_column(found.astype(np.int32))
                tables.append(rows.select(["task", "unit", "row"]).append_column("neighbours", column))
                numbers.append(np.full(len(found), partition))
        table, bucket = pa.concat_tables(tables), np.concatenate(numbers)
        part = write_buckets(output, item.number, table, bucket, len(self._partitions.names))
        return Result([part], Counts(read=part.rows, written=part.rows))


class CommunitiesWorker:
    """Cut those of the item's partitions that are split into communities, in packing order.

    Writes their centroids as a fit does, and the community of each row, bucketed by the row's task.
    """

    def __init__(
        self, config: RunConfig, partitions: Partitions, gathered: StoredParts, neighbours: StoredParts, tasks: int
    ) -> None:
        torch.set_num_threads(1)
        self._config, self._partitions, self._tasks = config, partitions, tasks
        self._gathered, self._neighbours = Gathered(gathered.artifact, gathered.parts), neighbours

    def process(self, item: WorkItem, output: Artifact) -> Result:
        partitions: range = item.payload
        artifact, parts = self._neighbours.artifact, self._neighbours.parts
        several = len(partitions) > 1
        self._gathered.hold(partitions if several else range(0))
        together = read_buckets(artifact, parts, partitions) if several else []
        fits: list[NamedFit] = []
        placed: list[pa.Table] = []
        for place, partition in enumerate(partitions):
            if self._partitions.clusters[partition] > 1:
                # Piece by piece: together with their graph the neighbours are most of what this takes.
                pieces = [together[place]] if several else list(iterate_bucket(artifact, parts, partition))
                fit, rows = self._cut(partition, pieces)
                fits.append(fit)
                placed.append(rows)
        rows = pa.concat_tables(placed)
        written = [
            *write_fits(output, item.number, fits),
            write_buckets(output, item.number, rows, rows["task"].to_numpy(), self._tasks, content=LABELS),
        ]
        return Result(written, Counts(read=rows.num_rows, written=rows.num_rows))

    def _cut(self, partition: int, pieces: list[pa.Table]) -> tuple[NamedFit, pa.Table]:
        """Return the partition's centroids, and the community of each row; empties `pieces`, its neighbours."""
        rows = pa.concat_tables([piece.drop_columns("neighbours") for piece in pieces])
        found = np.concatenate([vector_values(piece["neighbours"]) for piece in pieces])
        pieces.clear()
        size = community_size(self._config, len(found), int(self._partitions.clusters[partition]))
        label = communities(found, size, self._config.cluster.seed)
        label, centroids = self._in_packing_order(partition, label)
        return self._fit(partition, label, centroids), rows.append_column("cluster", pa.array(label))

    def _in_packing_order(self, partition: int, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) int64 communities and their (C, D) float32 centroids in that order."""
        sums: np.ndarray | None = None
        start = 0
        for values in self._features(partition):
            if sums is None:
                sums = np.zeros((int(label.max()) + 1, values.shape[1]))
            np.add.at(sums, label[start : start + len(values)], values)
            start += len(values)
        assert sums is not None, "a partition without rows"
        centroids = unit_length(sums).astype(np.float32)
        order = packing_order(centroids, np.bincount(label))
        return np.argsort(order)[label], centroids[order]

    def _fit(self, partition: int, label: np.ndarray, centroids: np.ndarray) -> NamedFit:
        cosines, start = np.empty(len(label), np.float32), 0
        for values in self._features(partition):
            rows = slice(start, start + len(values))
            cosines[rows] = np.einsum("nd,nd->n", values, centroids[label[rows]])
            start += len(values)
        share = self._config.cluster.drop_outliers
        columns = {
            "centroid": vector_column(centroids),
            "sampled": np.bincount(label, minlength=len(centroids)),
            "bias": pa.nulls(len(centroids), pa.float32()),
        }
        details = FitPart(
            content="centroids",
            group=self._partitions.names[partition],
            level=1,
            coarse=0,
            mean_cosine=float(np.mean(cosines, dtype=np.float64)),
            outlier_below=NO_OUTLIERS if share is None else float(np.quantile(cosines, share)),
        )
        return details, pa.table(columns)

    def _features(self, partition: int) -> Iterator[np.ndarray]:
        features = self._config.cluster.features
        return (feature_vectors(piece, features) for piece in self._gathered.pieces(partition))
