"""The sample that a fit sees: uniform over each group, the same whatever the workers, in one streaming pass."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_columns, feature_vectors
from clusterbatch.clustering.groups import Groups, row_hashes
from clusterbatch.clustering.tasks import TaskUnit, read_vectors
from clusterbatch.corpus.units import read_unit
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.exchange import write_buckets


def sample_thresholds(groups: Groups, sample_per_centroid: int) -> np.ndarray:
    """(G,) float64: the share of each group's rows that is wanted; groups that are not split need no sample."""
    wanted = groups.clusters * sample_per_centroid
    return np.where(groups.clusters > 1, np.minimum(1.0, wanted / groups.rows), 0.0)


class SampleWorker:
    """Keeps the rows whose hash is below their group's threshold; writes them bucketed by group."""

    def __init__(
        self,
        corpus: Artifact,
        embeddings: Artifact,
        output: Artifact,
        fingerprint: str,
        groups: Groups,
        thresholds: np.ndarray,
        features: Features,
        seed: int,
    ) -> None:
        self._corpus, self._embeddings, self._sample = corpus, embeddings, output
        self._fingerprint = fingerprint
        self._groups, self._thresholds = groups, thresholds
        self._features: Features = features
        self._seed = seed

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        kept = [self._pick(item) for item in unit.payload]
        groups = np.concatenate([group for group, _ in kept])
        table = pa.concat_tables([rows for _, rows in kept])
        part = write_buckets(self._sample, unit.number, table, groups, len(self._groups.names))
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=unit.rows, written=len(groups), set_aside={"not sampled": unit.rows - len(groups)}),
            seconds=watch.seconds,
        )
        self._sample.write_receipt(receipt)
        return receipt

    def _pick(self, item: TaskUnit) -> tuple[np.ndarray, pa.Table]:
        rows = read_unit(self._corpus, item.unit, ["pair_id", "source"])
        groups = self._groups.of_rows(rows["source"])
        # Another seed than the order inside clusters has: a sample should not be the head of every cluster.
        hashes = row_hashes(rows["pair_id"], self._seed + 1)
        kept = np.flatnonzero(hashes / 2.0**64 < self._thresholds[groups])
        # Nothing wanted, nothing read but one row, for the schema.
        vectors = read_vectors(self._embeddings, item, feature_columns(self._features)).take(kept)
        values = feature_vectors(vectors, self._features).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        return groups[kept], pa.table({"hash": hashes[kept], "vector": column})
