"""The fits of all groups as they lie on storage: what workers read them from, whatever the number of centroids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from clusterbatch.clustering.fitting import read_models
from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.labels import read_label_models
from clusterbatch.clustering.models import GroupModel
from clusterbatch.store import Artifact, Part


@dataclass(frozen=True)
class StoredModels:
    """levels: for one or two levels, the pass that fitted it and its parts; labelled: clusters are the user's own."""

    groups: Groups
    levels: Sequence[tuple[Artifact, Sequence[Part]]] = field(default_factory=tuple)
    labelled: bool = False

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
