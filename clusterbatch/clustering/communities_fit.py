"""The passes for communities: rows are gathered by group, neighbours searched, and each group's graph is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.communities import communities
from clusterbatch.clustering.features import feature_vectors, unit_length
from clusterbatch.clustering.model import PlacedRows, StoredModels
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partitions import community_size
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.runtime import Unit
from clusterbatch.search.gather import Gathered, GatherWorker, blocks
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import iterate_bucket, write_buckets
from clusterbatch.store.tables import write_parquet

if TYPE_CHECKING:
    from clusterbatch.shards.passes import Passes

CENTROIDS, LABELS = "centroids", "labels"


class NeighboursWorker:
    """Searches the queries of a block in their group; writes the rows found at the ranks that count, by group."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        gathered: Artifact,
        vectors: Sequence[Part],
        output: Artifact,
        fingerprint: str,
    ) -> None:
        torch.set_num_threads(1)
        self._first, self._last = config.cluster.neighbour_ranks
        self._gathered, self._groups = Gathered(gathered, vectors), len(groups.names)
        self._output, self._fingerprint = output, fingerprint

    def process(self, unit: Unit) -> Receipt:
        watch, block = Stopwatch(), unit.payload
        rows = self._gathered.rows(block)
        found = self._gathered.search(block.group, rows, self._last).ranking.documents[:, self._first :]
        table = rows.select(["task", "unit", "row"]).append_column("neighbours", vector_column(found.astype(np.int32)))
        part = write_buckets(self._output, unit.number, table, np.full(len(found), block.group), self._groups)
        counts = Counts(read=unit.rows, written=table.num_rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=[part], counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt


class CommunitiesWorker:
    """Cuts the group that is the unit's number into communities, in packing order.

    Writes their centroids as a fit does (fitting.py), and the community of each row, bucketed by its task.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        gathered: Artifact,
        vectors: Sequence[Part],
        neighbours: Artifact,
        neighbours_parts: Sequence[Part],
        tasks: int,
        output: Artifact,
        fingerprint: str,
    ) -> None:
        torch.set_num_threads(1)
        self._config, self._groups, self._tasks = config, groups, tasks
        self._gathered = Gathered(gathered, vectors)
        self._neighbours, self._neighbours_parts = neighbours, neighbours_parts
        self._output, self._fingerprint = output, fingerprint

    def process(self, unit: Unit) -> Receipt:
        watch, group = Stopwatch(), unit.number
        # Piece by piece: together with their graph the neighbours are most of what this takes.
        pieces = list(iterate_bucket(self._neighbours, self._neighbours_parts, group))
        rows = pa.concat_tables([piece.drop_columns("neighbours") for piece in pieces])
        found = np.concatenate([vector_values(piece["neighbours"]) for piece in pieces])
        del pieces
        size = community_size(self._config, unit.rows, int(self._groups.clusters[group]))
        label = communities(found, size, self._config.cluster.seed)
        label, centroids = self._in_packing_order(group, label)
        parts = [
            self._write_centroids(group, label, centroids),
            write_buckets(
                self._output,
                group,
                rows.select(["unit", "row"]).append_column("cluster", pa.array(label)),
                rows["task"].to_numpy(),
                self._tasks,
                content=LABELS,
            ),
        ]
        counts = Counts(read=unit.rows, written=rows.num_rows)
        receipt = Receipt(unit=group, fingerprint=self._fingerprint, parts=parts, counts=counts, seconds=watch.seconds)
        self._output.write_receipt(receipt)
        return receipt

    def _in_packing_order(self, group: int, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 and the (C, D) float32 centroids in that order."""
        sums: np.ndarray | None = None
        start = 0
        for values in self._features(group):
            if sums is None:
                sums = np.zeros((int(label.max()) + 1, values.shape[1]))
            np.add.at(sums, label[start : start + len(values)], values)
            start += len(values)
        assert sums is not None, "a group without rows"
        centroids = unit_length(sums).astype(np.float32)
        order = packing_order(centroids, np.bincount(label))
        return np.argsort(order)[label], centroids[order]

    def _write_centroids(self, group: int, label: np.ndarray, centroids: np.ndarray) -> Part:
        cosines, start = np.empty(len(label), np.float32), 0
        for values in self._features(group):
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
            self._output,
            f"centroids-{group:05d}",
            pa.table(columns),
            content=CENTROIDS,
            group=self._groups.names[group],
            level=1,
            coarse=0,
            mean_cosine=float(np.mean(cosines, dtype=np.float64)),
            outlier_below=-2.0 if share is None else float(np.quantile(cosines, share)),
        )

    def _features(self, group: int) -> Iterator[np.ndarray]:
        return (feature_vectors(piece, self._config.cluster.features) for piece in self._gathered.pieces(group))


def fit_communities(passes: Passes) -> StoredModels:
    """The passes: neighbours of all queries, then the graph of each group that is split."""
    config, groups = passes.config, passes.groups
    split = np.flatnonzero(groups.clusters > 1).tolist()
    if not split:
        return StoredModels(groups)
    arguments: dict[str, Any] = {"config": config, "groups": groups}
    gathering = {**arguments, "generation": passes.vectors, "texts": False}
    gathered = passes.run("gather", passes.units, GatherWorker, gathering, passes.reading_pool).parts
    arguments |= {"gathered": passes.artifact("gather"), "vectors": gathered}
    searched = [unit for unit in blocks(gathered, groups) if unit.payload.group in split]
    found = passes.run("neighbours", searched, NeighboursWorker, arguments, passes.pool).parts
    arguments |= {"neighbours": passes.artifact("neighbours"), "neighbours_parts": found, "tasks": len(passes.units)}
    # The largest first: no worker then ends long after the others.
    units = sorted((Unit(group, int(groups.rows[group]), None) for group in split), key=lambda unit: -unit.rows)
    made = passes.run("communities", units, CommunitiesWorker, arguments, passes.pool).parts
    artifact = passes.artifact("communities")
    centroids, labels = (
        [part for part in made if part.details["content"] == content] for content in (CENTROIDS, LABELS)
    )
    return StoredModels(groups, ((artifact, centroids),), placed=PlacedRows(artifact, labels))
