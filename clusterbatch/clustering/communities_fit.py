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
    NO_OUTLIERS,
    CentroidClusters,
    FittedClusters,
    KMeansClusters,
    Numbered,
    PartitionModel,
    StoredParts,
    UnitRows,
    read_models,
)
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search.gather import Block, Gathered, GatherWorker, blocks
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.shuffle import iterate_bucket, read_bucket, write_buckets
from clusterbatch.store.tables import write_parquet

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
    split = np.flatnonzero(partitions.clusters > 1).tolist()
    if not split:
        return KMeansClusters(partitions, features)
    gathering = {"config": config, "generation": corpus.generation, "partitions": partitions, "texts": False}
    gathered = passes.run("gather", corpus.items, GatherWorker, gathering, corpus.reading_pool)
    searched = [item for item in blocks(gathered.parts, partitions) if item.payload.partition in split]
    searching = {"ranks": config.cluster.neighbour_ranks, "gathered": gathered, "partitions": len(partitions.names)}
    neighbours = passes.run("neighbours", searched, NeighboursWorker, searching, corpus.pool)
    cutting = {
        "config": config,
        "partitions": partitions,
        "gathered": gathered,
        "neighbours": neighbours,
        "tasks": len(corpus.items),
    }
    # The largest first, so that no worker ends long after the others.
    items = sorted((WorkItem(p, int(partitions.rows[p]), None) for p in split), key=lambda item: -item.rows)
    cut = passes.run("communities", items, CommunitiesWorker, cutting, corpus.pool)
    centroids, placed = (
        StoredParts(cut.artifact, [part for part in cut.parts if part.details["content"] == content])
        for content in (CENTROIDS, LABELS)
    )
    return CommunityClusters(partitions, features, [centroids], placed)


class NeighboursWorker:
    """Search a block of queries in their partition; write the rows found at the ranks that count, by partition."""

    def __init__(self, ranks: tuple[int, int], gathered: StoredParts, partitions: int) -> None:
        torch.set_num_threads(1)
        self._first, self._last = ranks
        self._gathered, self._partitions = Gathered(gathered.artifact, gathered.parts), partitions

    def process(self, item: WorkItem, output: Artifact) -> Result:
        block: Block = item.payload
        rows = self._gathered.rows(block)
        found = self._gathered.search(block.partition, rows, self._last).ranking.documents[:, self._first :]
        table = rows.select(["task", "unit", "row"]).append_column("neighbours", vector_column(found.astype(np.int32)))
        part = write_buckets(output, item.number, table, np.full(len(found), block.partition), self._partitions)
        return Result([part], Counts(read=item.rows, written=table.num_rows))


class CommunitiesWorker:
    """Cut the item's partition into communities, in packing order.

    Writes their centroids as a fit does, and the community of each row, bucketed by the row's task.
    """

    def __init__(
        self, config: RunConfig, partitions: Partitions, gathered: StoredParts, neighbours: StoredParts, tasks: int
    ) -> None:
        torch.set_num_threads(1)
        self._config, self._partitions, self._tasks = config, partitions, tasks
        self._gathered, self._neighbours = Gathered(gathered.artifact, gathered.parts), neighbours

    def process(self, item: WorkItem, output: Artifact) -> Result:
        partition = item.number
        # Piece by piece: together with their graph the neighbours are most of what this takes.
        pieces = list(iterate_bucket(self._neighbours.artifact, self._neighbours.parts, partition))
        rows = pa.concat_tables([piece.drop_columns("neighbours") for piece in pieces])
        found = np.concatenate([vector_values(piece["neighbours"]) for piece in pieces])
        del pieces
        size = community_size(self._config, item.rows, int(self._partitions.clusters[partition]))
        label = communities(found, size, self._config.cluster.seed)
        label, centroids = self._in_packing_order(partition, label)
        placed = rows.select(["unit", "row"]).append_column("cluster", pa.array(label))
        parts = [
            self._write_centroids(output, partition, label, centroids),
            write_buckets(output, partition, placed, rows["task"].to_numpy(), self._tasks, content=LABELS),
        ]
        return Result(parts, Counts(read=item.rows, written=rows.num_rows))

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

    def _write_centroids(self, output: Artifact, partition: int, label: np.ndarray, centroids: np.ndarray) -> Part:
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
        return write_parquet(
            output,
            f"centroids-{partition:05d}",
            pa.table(columns),
            content=CENTROIDS,
            group=self._partitions.names[partition],
            level=1,
            coarse=0,
            mean_cosine=float(np.mean(cosines, dtype=np.float64)),
            outlier_below=NO_OUTLIERS if share is None else float(np.quantile(cosines, share)),
        )

    def _features(self, partition: int) -> Iterator[np.ndarray]:
        features = self._config.cluster.features
        return (feature_vectors(piece, features) for piece in self._gathered.pieces(partition))
