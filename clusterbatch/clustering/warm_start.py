"""The generation before: where its vectors and centroids put each row.

The next generation's space may be another one (the model has been trained in between), so its centroids cannot be
compared with the old ones. What carries over is which rows stood together: clusters begin at the means of those rows in
the new space, keep their numbers, and drift is how many rows leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_sides, feature_vectors
from clusterbatch.clustering.model import GroupAssigner, GroupModel, StoredModels
from clusterbatch.config import EmbedConfig, RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.vectors import TaskUnit, VectorSource
from clusterbatch.errors import UsageError
from clusterbatch.hashing import row_hashes
from clusterbatch.store import Artifact, Part
from clusterbatch.store.workspace import Workspace

# A group whose number of clusters should be more than so many times another (its rows have grown or gone) begins anew.
_MOST_GROWTH = 1.5


@dataclass(frozen=True)
class Previous:
    """A committed generation of clusters and the vectors that they were made from. Picklable.

    config: with the section `embed` of then; parts: its vectors by corpus unit, None where they were not kept (units
    beyond them are rows that it did not have); levels: its fits, as StoredModels takes them; keep: share of the rows
    that stay where it put them; vectors: the generation whose embeddings those are; frozen: its centroids stay as they
    are, which wants vectors of the same model.
    """

    config: RunConfig
    generation: int
    features: Features
    parts: Sequence[Part | None]
    levels: Sequence[tuple[Artifact, Sequence[Part]]]
    fingerprint: str
    vectors: int
    keep: float = 0.0
    frozen: bool = False

    @staticmethod
    def of(config: RunConfig, generation: int, keep: float = 0.0, frozen: bool = False) -> Previous:
        """From the workspace. Raises DataError where the generation is not whole, UsageError where it has no fits."""
        workspace = Workspace(config)
        clusters = workspace.clusters(generation)
        manifest = clusters.require()
        vectors = int(manifest.details.get("vectors", generation))
        corpus, embeddings = workspace.corpus.require(), workspace.embeddings(vectors).require()
        if manifest.config["stratify"] != "cluster":
            raise UsageError(
                f"refresh: the clusters of generation {generation} are by {manifest.config['stratify']}, not by "
                "vectors; there is nothing to cluster again"
            )
        if embeddings.inputs["corpus"] not in corpus.lineage:
            raise UsageError(
                f"refresh: the corpus of generation {generation} was another one, not an earlier version of this; "
                "begin a new workspace"
            )
        by_level: dict[int, list[Part]] = {}
        for part in manifest.parts:
            if part.details.get("content") in ("centroids", "projection"):
                by_level.setdefault(part.details["level"], []).append(part)
        units = row_groups_of(corpus)
        persisted = embeddings.details.get("persisted", True)
        embed = EmbedConfig.model_validate(embeddings.config) if embeddings.config else config.embed
        # What vectors are computed on is today's choice: the machines of then may be gone.
        embed = embed.model_copy(update={"device": config.embed.device})
        return Previous(
            config=config.model_copy(update={"embed": embed}),
            generation=generation,
            features=manifest.config["features"],
            parts=list(embeddings.parts) if persisted else [None] * len(units),
            levels=tuple((clusters, parts) for _, parts in sorted(by_level.items())),
            fingerprint=manifest.fingerprint,
            vectors=vectors,
            keep=keep,
            frozen=frozen,
        )

    def models(self, groups: Groups) -> dict[int, GroupModel]:
        """By group of today's corpus; groups that were not split, or were not there, have none."""
        levels = [
            (artifact, [part for part in parts if part.details["group"] in groups.names])
            for artifact, parts in self.levels
        ]
        return StoredModels(groups, levels).load()

    def held(self, groups: Groups) -> dict[int, GroupModel]:
        """The models of the groups whose clusters go on; the others begin anew."""
        return {
            group: model
            for group, model in self.models(groups).items()
            if 1 / _MOST_GROWTH <= groups.clusters[group] / len(model.shares) <= _MOST_GROWTH
        }


class PreviousAssigner:
    """Assigns rows as the generation before would: by its vectors, to its centroids."""

    def __init__(self, previous: Previous, models: dict[int, GroupModel]) -> None:
        self._previous = previous
        self._vectors = VectorSource(previous.config, previous.vectors)
        self._models = models
        self._assigners = {group: GroupAssigner(model) for group, model in models.items()}

    def __call__(self, item: TaskUnit, group: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 cluster inside the group, -1 where it is not known, for `rows` of the unit, of `group` (n,)."""
        found, _ = self.with_features(item, group, rows)
        return found

    def with_features(
        self, item: TaskUnit, group: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The same, and the (n, D) features it went by; None where the unit is new."""
        found = np.full(len(rows), -1, np.int64)
        if item.unit.number >= len(self._previous.parts):
            return found, None
        old = TaskUnit(item.unit, self._previous.parts[item.unit.number])
        features = self._previous.features
        values = feature_vectors(self._vectors.read(old, feature_sides(features), rows), features)
        for number in np.unique(group).tolist():
            if number in self._assigners:
                here = np.flatnonzero(group == number)
                found[here], _ = self._assigners[number](values[here])
        return found, values

    def in_cells(self, found: np.ndarray, group: np.ndarray, coarse: np.ndarray | None) -> np.ndarray:
        """(n,) int64: number inside the cell that a row is fitted in, -1 where it came from outside of it.

        coarse: (n,) today's coarse clusters, where cells are those; None on the first level.
        """
        numbers = found.copy()
        for number in np.unique(group[found >= 0]).tolist():
            model, here = self._models[number], np.flatnonzero((group == number) & (found >= 0))
            if model.coarse is None:
                continue
            first = model.first_of_coarse
            owner = np.searchsorted(first, found[here], side="right") - 1
            numbers[here] = owner if coarse is None else np.where(owner == coarse[here], found[here] - first[owner], -1)
        return numbers


class KeptRows:
    """Which rows stay where they were: a share of them, drawn by hash, anew in every generation."""

    def __init__(self, previous: Previous, groups: Groups, seed: int) -> None:
        held = previous.held(groups)
        self._share, self._held = previous.keep, held
        self._assigner = PreviousAssigner(previous, held)
        # Seeds of their own: neither the order inside clusters nor the fit's sample may decide who stays.
        self._seed = seed + 2 + previous.generation

    def __call__(self, item: TaskUnit, pair_ids: pa.ChunkedArray, group: np.ndarray) -> np.ndarray:
        """(rows,) int64 of a whole unit: the cluster inside its group that a row stays in, -1 where it does not."""
        stays = row_hashes(pair_ids, self._seed) / 2.0**64 < self._share
        rows = np.flatnonzero(stays & np.isin(group, list(self._held)))
        kept = np.full(len(group), -1, np.int64)
        if len(rows):
            kept[rows] = self._assigner(item, group[rows], rows)
        return kept
