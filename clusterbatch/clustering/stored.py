"""The fits of all groups as they lie on storage: what workers read them from, whatever the number of centroids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from clusterbatch.clustering.fitting import read_models
from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.labels import read_label_models
from clusterbatch.clustering.models import GroupModel
from clusterbatch.store import Artifact, Part
from clusterbatch.store.exchange import read_bucket


@dataclass(frozen=True)
class PlacedRows:
    """The cluster of every row of the groups that are split, where that is not the nearest centroid's. Picklable."""

    artifact: Artifact
    parts: Sequence[Part]

    def of_task(self, task: int) -> dict[int, np.ndarray]:
        """By number of the corpus unit: (rows, 2) int64, row of the unit and cluster inside its group."""
        table = read_bucket(self.artifact, self.parts, task)
        if table is None:
            return {}
        unit = table["unit"].to_numpy()
        found = np.stack([table[name].to_numpy() for name in ("row", "cluster")], axis=1)
        return {number: found[unit == number] for number in np.unique(unit).tolist()}


@dataclass(frozen=True)
class StoredModels:
    """levels: for one or two levels, the pass that fitted it and its parts; labelled: clusters are the user's own;
    placed: where rows stand already, and centroids only describe their clusters."""

    groups: Groups
    levels: Sequence[tuple[Artifact, Sequence[Part]]] = field(default_factory=tuple)
    labelled: bool = False
    placed: PlacedRows | None = None

    @property
    def parts(self) -> list[tuple[Artifact, Part]]:
        return [(artifact, part) for artifact, parts in self.levels for part in parts]

    def load(self) -> dict[int, GroupModel]:
        """By group; groups that are not split have none."""
        models: dict[int, GroupModel] = {}
        for artifact, parts in self.levels:
            if self.labelled:
                return read_label_models(artifact, parts, self.groups)
            coarse = models
            models = {
                group: replace(model, coarse=coarse[group].fine[0], matrix=coarse[group].matrix)
                if group in coarse
                else model
                for group, model in read_models(artifact, parts, self.groups).items()
            }
            models = {**coarse, **models}
        return models
