"""Warm start: clusters that continue those of the generation before.

The next generation's space may be another one (the model has been trained in between), so its centroids cannot be
compared with the old ones. Only the grouping of rows carries over: clusters begin at the means of the old groups in the
new space and keep their numbers, and drift is the share of rows that leave them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.cells import grouping_of
from clusterbatch.clustering.features import Features, feature_sides, feature_vectors
from clusterbatch.clustering.model import (
    Assigned,
    KMeansClusters,
    PartitionAssigner,
    PartitionModel,
    StoredFit,
    StoredParts,
    UnitRows,
    stored_fits,
)
from clusterbatch.config import EmbedConfig, RunConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.vectors import TaskUnit, VectorSource
from clusterbatch.errors import UsageError
from clusterbatch.hashing import row_hashes
from clusterbatch.store import Part
from clusterbatch.store.details import ClustersDetails, details_of, has_vectors
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

# A partition starts from scratch if its number of clusters should be more than this factor away from what it was (rows
# have come or gone).
_MOST_GROWTH = 1.5


@dataclass(frozen=True)
class Previous:
    """A committed generation of clusters and the vectors that they were made from. Picklable.

    config: with the section `embed` of that generation; parts: its vectors by corpus unit, None if they were not kept
    (units beyond them are new to the corpus); levels: its fits; vectors: the generation whose embeddings those are;
    keep: share of the rows that stay in its clusters; frozen: its centroids are kept, which requires vectors of the
    same model.
    """

    config: RunConfig
    generation: int
    features: Features
    parts: Sequence[Part | None]
    levels: Sequence[StoredParts]
    fingerprint: str
    vectors: int
    keep: float = 0.0
    frozen: bool = False

    @staticmethod
    def of(config: RunConfig, generation: int, keep: float = 0.0, frozen: bool = False) -> Previous:
        """Open a generation of the workspace.

        Raises DataError if it is not finished, UsageError if its corpus was another one, or if clusters are made by
        vectors but these were not.
        """
        workspace = Workspace(config)
        clusters = workspace.clusters(generation)
        manifest = clusters.require()
        vectors = int(details_of(manifest, ClustersDetails).get("vectors", generation))
        corpus, embeddings = workspace.corpus.require(), workspace.embeddings(vectors).require()
        if grouping_of(config) not in ("source", "random") and manifest.config["stratify"] != "cluster":
            raise UsageError(
                f"refresh: the clusters of generation {generation} are by {manifest.config['stratify']}, not by "
                "vectors; there is nothing to cluster again"
            )
        if embeddings.inputs["corpus"] not in corpus.lineage:
            raise UsageError(
                f"refresh: the corpus of generation {generation} was another one, not an earlier version of this; "
                "begin a new workspace"
            )
        persisted = has_vectors(embeddings)
        embed = EmbedConfig.model_validate(embeddings.config) if embeddings.config else config.embed
        # The device is today's choice: the machines of that generation may be gone.
        embed = embed.model_copy(update={"device": config.embed.device})
        return Previous(
            config=config.model_copy(update={"embed": embed}),
            generation=generation,
            features=manifest.config["features"],
            parts=list(embeddings.parts) if persisted else [None] * len(row_groups_of(corpus)),
            levels=stored_levels(StoredParts(clusters, manifest.parts)),
            fingerprint=manifest.fingerprint,
            vectors=vectors,
            keep=keep,
            frozen=frozen,
        )

    def models(self, partitions: Partitions) -> Mapping[int, PartitionModel]:
        """Return its models by partition of today's corpus; one that is new or was not split has none."""
        return KMeansClusters(partitions, self.features, self.levels).models

    def held(self, partitions: Partitions) -> dict[int, PartitionModel]:
        """Return the models of the partitions whose clusters continue; the others start from scratch."""
        return {
            partition: model
            for partition, model in self.models(partitions).items()
            if 1 / _MOST_GROWTH <= partitions.clusters[partition] / len(model.shares) <= _MOST_GROWTH
        }


def stored_levels(clusters: StoredParts) -> list[StoredParts]:
    """Return the fits of each level, the coarse one first, among the parts of a committed clusters artifact."""
    by_level: dict[int, list[Part]] = {}
    for part in clusters.parts:
        if part.details.get("content") in ("centroids", "projection"):
            by_level.setdefault(part.details["level"], []).append(part)
    return [StoredParts(clusters.artifact, parts) for _, parts in sorted(by_level.items())]


@dataclass(frozen=True)
class WarmStart:
    """The partitions whose fits continue those of `previous`. Picklable."""

    previous: Previous
    held: frozenset[int]

    def stored_table(self, level: int, content: str, name: str, coarse: int) -> pa.Table | None:
        """Return the stored centroids or projection of a cell that a frozen generation has; None if it has none.

        name: of the partition; coarse: the cell's coarse cluster.
        """
        fit = self._fits[level - 1].get((content, name, coarse))
        if fit is None:
            return None
        # Kept for the next cells, which are often of the same part.
        if self._read.get(content, ("", None))[0] != fit.part.path:
            folder = self.previous.levels[level - 1].artifact.folder
            self._read[content] = fit.part.path, read_parquet(folder, fit.part)
        return self._read[content][1].slice(fit.first, fit.rows)

    def __getstate__(self) -> dict[str, object]:
        return {"previous": self.previous, "held": self.held}

    @cached_property
    def _fits(self) -> list[dict[tuple[str, str, int], StoredFit]]:
        fits = [stored_fits(level.parts) for level in self.previous.levels]
        return [
            {(fit.details["content"], fit.details["group"], fit.details["coarse"]): fit for fit in of_level}
            for of_level in fits
        ]

    @cached_property
    def _read(self) -> dict[str, tuple[str, pa.Table]]:
        return {}


class PreviousAssigner:
    """Assign rows as the generation before would: by its vectors, to its centroids."""

    def __init__(self, previous: Previous, models: Mapping[int, PartitionModel]) -> None:
        self._previous = previous
        self._vectors = VectorSource(previous.config, previous.vectors)
        self._models = models
        self._assigners = {partition: PartitionAssigner(model) for partition, model in models.items()}

    def __call__(self, unit: TaskUnit, partition: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (n,) int64 clusters inside the partition, -1 if unknown, of `rows` of the unit in `partition` (n,)."""
        found, _ = self.with_features(unit, partition, rows)
        return found

    def with_features(
        self, unit: TaskUnit, partition: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the same, and the (n, D) features that decided; None if the unit is new to the corpus."""
        found = np.full(len(rows), -1, np.int64)
        if unit.unit.number >= len(self._previous.parts):
            return found, None
        old = TaskUnit(unit.unit, self._previous.parts[unit.unit.number])
        features = self._previous.features
        values = feature_vectors(self._vectors.read(old, feature_sides(features), rows), features)
        for number in np.unique(partition).tolist():
            if number in self._assigners:
                places = np.flatnonzero(partition == number)
                found[places], _ = self._assigners[number](values[places])
        return found, values

    def in_cells(self, found: np.ndarray, partition: np.ndarray, coarse: np.ndarray | None) -> np.ndarray:
        """Return (n,) int64 numbers inside the cell that a row is fitted in, -1 if it came from outside of that cell.

        found: (n,) what `__call__` returned; coarse: (n,) today's coarse clusters if cells are those; None on the first
        level.
        """
        numbers = found.copy()
        for number in np.unique(partition[found >= 0]).tolist():
            model, places = self._models[number], np.flatnonzero((partition == number) & (found >= 0))
            if model.coarse is None:
                continue
            first = model.first_of_coarse
            owner = np.searchsorted(first, found[places], side="right") - 1
            inside = found[places] - first[owner]
            numbers[places] = owner if coarse is None else np.where(owner == coarse[places], inside, -1)
        return numbers


class KeptRows:
    """Rows that stay in their cluster: a share of them, drawn by hash, other ones in every generation."""

    def __init__(self, previous: Previous, partitions: Partitions, seed: int) -> None:
        held = previous.held(partitions)
        self._share, self._held = previous.keep, held
        self._assigner = PreviousAssigner(previous, held)
        # A seed of its own: neither the order inside clusters nor the fit's sample may decide which rows stay.
        self._seed = seed + 2 + previous.generation

    def __call__(self, unit: TaskUnit, pair_ids: pa.ChunkedArray, partition: np.ndarray) -> np.ndarray:
        """Return (rows,) int64 of a whole unit: the cluster that a row stays in, inside its partition, or -1."""
        stays = row_hashes(pair_ids, self._seed) / 2.0**64 < self._share
        rows = np.flatnonzero(stays & np.isin(partition, list(self._held)))
        kept = np.full(len(partition), -1, np.int64)
        if len(rows):
            kept[rows] = self._assigner(unit, partition[rows], rows)
        return kept


@dataclass(frozen=True)
class KeptClusters:
    """K-means clusters, but a share of the rows (`previous.keep`) stays where the generation before had it."""

    clusters: KMeansClusters
    previous: Previous
    seed: int

    def __getstate__(self) -> dict[str, object]:
        return {"clusters": self.clusters, "previous": self.previous, "seed": self.seed}

    @property
    def stored(self) -> Sequence[StoredParts]:
        return self.clusters.stored

    def shares(self) -> Mapping[int, np.ndarray]:
        return self.clusters.shares()

    def describe(self) -> dict[str, dict[str, Any]]:
        return self.clusters.describe()

    def assign(self, rows: UnitRows, vectors: pa.Table | None) -> Assigned:
        found = self.clusters.assign(rows, vectors)
        kept = self._kept(rows.unit, rows.table["pair_id"], rows.partition)
        for partition, places, values in self.clusters.features_by_partition(rows, vectors, kept >= 0):
            model = self.clusters.models[partition]
            cosine = model.cosine(values, kept[places])
            found.cluster[places], found.cosine[places] = kept[places], cosine
            found.outlier[places] = cosine < model.outlier_below
        return found

    @cached_property
    def _kept(self) -> KeptRows:
        return KeptRows(self.previous, self.clusters.partitions, self.seed)
