"""Drift of a workspace: a pass that samples and embeds rows, and one that measures partition by partition."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.cells import partitions_of
from clusterbatch.clustering.drift import GroupDrift, group_drift, merge_drifts
from clusterbatch.clustering.embedded_corpus import EmbeddedRows
from clusterbatch.clustering.features import Features, feature_vectors
from clusterbatch.clustering.model import StoredParts
from clusterbatch.clustering.warm_start import Previous, PreviousAssigner
from clusterbatch.config import RunConfig
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.stage import embedding_pool
from clusterbatch.embedding.vectors import SIDES, TaskUnit, tasks, vector_column, vector_values
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Pass, Pool, Result, WorkItem, bundle_items, ray_session
from clusterbatch.store import Artifact, Counts, Folder, Stopwatch
from clusterbatch.store.shuffle import read_buckets, write_buckets
from clusterbatch.store.workspace import Workspace

_ROWS_PER_CLUSTER = 32


def measure_drift(config: RunConfig, generation: int, previous: Previous, folder: Folder) -> dict[str, Any]:
    """Return the figures of `merge_drifts` for a sample of the corpus, and `seconds` that this took.

    config: that of the new generation, whose section `embed` names its surrogate; generation: whose embeddings that
    surrogate belongs to. The sample stays in `folder`, for a call that resumes an interrupted one, until the caller
    removes it.
    """
    watch = Stopwatch()
    corpus = Workspace(config).corpus.require()
    partitions = partitions_of(config, corpus)
    clusters = sum(len(model.shares) for model in previous.models(partitions).values())
    wanted = max(config.refresh.sample, _ROWS_PER_CLUSTER * clusters)
    share = min(1.0, wanted / max(1, corpus.counts.written))
    artifact = Artifact(folder, "sample for drift")
    identity = f"{previous.fingerprint}-{generation}-{share}-{corpus.fingerprint}"
    rows = EmbeddedRows(config, generation, partitions)
    arguments: dict[str, Any] = {"rows": rows, "previous": previous, "share": share}
    with ray_session(config.ray):
        sampling = Pass("drift sample", artifact, identity, DriftSampleWorker, arguments, embedding_pool(config.embed))
        # Tasks without kept vectors: those of the new generation are computed for the sample alone. A sample of an
        # earlier version of the corpus is replaced.
        sampled = sampling.run(tasks(corpus, None), force=True)
        parts = [part for receipt in sampled for part in receipt.parts]
        items = bundle_items(partitions.rows * share, sum(part.bytes for part in parts))
        arguments = {"sample": StoredParts(artifact, parts), "features": config.cluster.features}
        pool = Pool(config.embed.workers, config.embed.cpus_per_worker)
        measured = Pass("drift", None, identity, DriftWorker, arguments, pool).run(items)
    found = [GroupDrift(**drift) for receipt in measured for drift in receipt.details["drifts"]]
    return {**merge_drifts(found), "sampled": sum(part.rows for part in parts), "seconds": round(watch.seconds, 3)}


class DriftSampleWorker:
    """Draw rows by hash; keep their old cluster, the features that decided it, and their vectors in the new space."""

    def __init__(self, rows: EmbeddedRows, previous: Previous, share: float) -> None:
        self._corpus, self._vectors, self._partitions = rows.corpus, rows.vectors(), rows.partitions
        self._previous = PreviousAssigner(previous, previous.models(rows.partitions))
        self._share, self._seed = share, rows.config.cluster.seed + 1

    def process(self, item: WorkItem, output: Artifact) -> Result:
        picked = [found for found in map(self._pick, item.payload) if found is not None]
        parts = []
        if picked:
            partition = np.concatenate([partition for partition, _ in picked])
            table = pa.concat_tables([rows for _, rows in picked])
            parts = [write_buckets(output, item.number, table, partition, len(self._partitions.names))]
        kept = sum(part.rows for part in parts)
        return Result(parts, Counts(read=item.rows, written=kept, set_aside={"not sampled": item.rows - kept}))

    def _pick(self, unit: TaskUnit) -> tuple[np.ndarray, pa.Table] | None:
        """Return the partition and columns of sampled rows that had a cluster before; None if there are none."""
        rows = read_row_group(self._corpus, unit.unit, ["pair_id", "source"])
        kept = np.flatnonzero(row_hashes(rows["pair_id"], self._seed) / 2.0**64 < self._share)
        partition = self._partitions.of_rows(rows["source"])[kept]
        label, old = self._previous.with_features(unit, partition, kept)
        known = label >= 0
        if old is None or not known.any():
            return None
        table = self._vectors.read(unit, SIDES, kept[known]).select([f"{side}_vector" for side in SIDES])
        table = table.append_column("label", pa.array(label[known]))
        return partition[known], table.append_column("old", vector_column(old[known].astype(np.float16)))


class DriftWorker:
    """Measure the item's partitions."""

    def __init__(self, sample: StoredParts, features: Features) -> None:
        self._sample, self._features = sample, features

    def process(self, item: WorkItem, output: None) -> Result:
        tables = read_buckets(self._sample.artifact, self._sample.parts, item.payload)
        found = [self._drift(table) for table in tables if table is not None]
        return Result(details={"drifts": [asdict(drift) for drift in found if drift is not None]})

    def _drift(self, table: pa.Table) -> GroupDrift | None:
        return group_drift(
            table["label"].to_numpy(),
            vector_values(table["old"]),
            feature_vectors(table, self._features),
            *(vector_values(table[f"{side}_vector"]) for side in SIDES),
        )
