"""One group's centroids from its sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.features import vectors_of
from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.kmeans import FitSettings, LocalRows, fit
from clusterbatch.clustering.packing import packing_order
from clusterbatch.config import ClusterConfig
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import read_bucket
from clusterbatch.store.tables import read_parquet, write_parquet


class FitWorker:
    """Fits the group that is the unit's number; writes its centroids in packing order."""

    def __init__(
        self,
        sample: Artifact,
        sample_parts: Sequence[Part],
        output: Artifact,
        fingerprint: str,
        groups: Groups,
        config: ClusterConfig,
    ) -> None:
        self._sample, self._sample_parts = sample, sample_parts
        self._fitted, self._fingerprint = output, fingerprint
        self._groups, self._config = groups, config

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        table = read_bucket(self._sample, self._sample_parts, unit.number)
        assert table is not None, "a group that is split has a sample"
        order = np.argsort(table["hash"].to_numpy(), kind="stable")
        settings = FitSettings(
            clusters=int(self._groups.clusters[unit.number]),
            iterations=self._config.iterations,
            seed=self._config.seed,
            dtype=torch.float32,
        )
        found = fit(LocalRows(vectors_of(table["vector"])[order]), settings)
        packed = packing_order(found.centroids)
        column = pa.FixedSizeListArray.from_arrays(pa.array(found.centroids[packed].ravel()), found.centroids.shape[1])
        centroids = pa.table({"centroid": column, "sampled": found.counts[packed]})
        part = write_parquet(
            self._fitted,
            f"centroids-{unit.number:05d}",
            centroids,
            content="centroids",
            group=self._groups.names[unit.number],
            mean_cosine=found.mean_cosine,
            rounds=len(found.history),
        )
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=table.num_rows, written=table.num_rows),
            seconds=watch.seconds,
        )
        self._fitted.write_receipt(receipt)
        return receipt


@dataclass(frozen=True)
class Centroids:
    """Of one group, in packing order. centroids: (K, D) float32, None where the group is not split; share: (K,)."""

    centroids: np.ndarray | None
    share: np.ndarray


def read_centroids(fitted: Artifact, parts: Sequence[Part], groups: Groups) -> list[Centroids]:
    """One entry per group; those without a part are one cluster."""
    by_group = {part.details["group"]: part for part in parts}
    found = []
    for name in groups.names:
        if name not in by_group:
            found.append(Centroids(None, np.ones(1)))
            continue
        table = read_parquet(fitted.folder, by_group[name].path)
        sampled = table["sampled"].to_numpy()
        found.append(Centroids(vectors_of(table["centroid"]), sampled / max(sampled.sum(), 1e-12)))
    return found
