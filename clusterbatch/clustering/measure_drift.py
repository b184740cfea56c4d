"""Drift of a workspace: one pass that samples and embeds, one that measures group by group; both bounded in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.drift import GroupDrift, group_drift, merge_drifts
from clusterbatch.clustering.features import Features, feature_vectors
from clusterbatch.clustering.partitions import groups_of
from clusterbatch.clustering.warm_start import Previous, PreviousAssigner
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.stage import embedding_pool
from clusterbatch.embedding.vectors import SIDES, TaskUnit, VectorSource, tasks, vector_column, vector_values
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.store import Artifact, Counts, Folder, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import read_bucket, write_buckets
from clusterbatch.store.workspace import Workspace

_ROWS_PER_CLUSTER = 32


def measure_drift(config: RunConfig, generation: int, previous: Previous, folder: Folder) -> dict[str, Any]:
    """What drift.merge_drifts says of a sample of the corpus, and `seconds` that took.

    config: that of the new generation, whose section `embed` names its surrogate; generation: whose embeddings that
    surrogate belongs to. The sample lies in `folder`, for a call that continues an interrupted one, until the caller
    removes it.
    """
    watch = Stopwatch()
    corpus = Workspace(config).corpus.require()
    groups = groups_of(config, corpus)
    clusters = sum(len(model.shares) for model in previous.models(groups).values())
    wanted = max(config.refresh.sample, _ROWS_PER_CLUSTER * clusters)
    share = min(1.0, wanted / max(1, corpus.counts.written))
    artifact = Artifact(folder, "sample for drift")
    identity = f"{previous.fingerprint}-{generation}-{share}-{corpus.fingerprint}"
    # A sample of an earlier version of the corpus is of no use.
    done = artifact.begin(identity, force=True)
    with ray_session(config.ray):
        arguments = {
            "config": config,
            "generation": generation,
            "previous": previous,
            "groups": groups,
            "share": share,
            "output": artifact,
            "fingerprint": identity,
        }
        # Units without kept vectors: those of the new generation are made for the sample alone.
        units = tasks(corpus, None)
        sampled = run_units(
            "drift sample", units, DriftSampleWorker, arguments, embedding_pool(config.embed), done=done
        )
        parts = [part for receipt in sampled for part in receipt.parts]
        each = [Unit(group, int(groups.rows[group] * share) + 1, None) for group in range(len(groups.names))]
        arguments = {"sample": artifact, "parts": parts, "features": config.cluster.features}
        pool = Pool(config.embed.workers, config.embed.cpus_per_worker)
        measured = run_units("drift", each, DriftWorker, arguments, pool)
    found = [GroupDrift(**receipt.details["drift"]) for receipt in measured if receipt.details["drift"]]
    return {**merge_drifts(found), "sampled": sum(part.rows for part in parts), "seconds": round(watch.seconds, 3)}


class DriftSampleWorker:
    """Draws rows by hash; keeps where they stood, what they stood by, and their vectors in the new space."""

    def __init__(
        self,
        config: RunConfig,
        generation: int,
        previous: Previous,
        groups: Groups,
        share: float,
        output: Artifact,
        fingerprint: str,
    ) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._previous = PreviousAssigner(previous, previous.models(groups))
        self._groups, self._share = groups, share
        self._output, self._fingerprint = output, fingerprint
        self._seed = config.cluster.seed + 1

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        picked = [found for found in map(self._pick, unit.payload) if found is not None]
        parts = []
        if picked:
            group = np.concatenate([group for group, _ in picked])
            table = pa.concat_tables([rows for _, rows in picked])
            parts = [write_buckets(self._output, unit.number, table, group, len(self._groups.names))]
        kept = sum(part.rows for part in parts)
        counts = Counts(read=unit.rows, written=kept, set_aside={"not sampled": unit.rows - kept})
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=parts, counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt

    def _pick(self, item: TaskUnit) -> tuple[np.ndarray, pa.Table] | None:
        """Rows that the generation before had in a cluster of several, by group."""
        rows = read_row_group(self._corpus, item.unit, ["pair_id", "source"])
        kept = np.flatnonzero(row_hashes(rows["pair_id"], self._seed) / 2.0**64 < self._share)
        group = self._groups.of_rows(rows["source"])[kept]
        label, old = self._previous.with_features(item, group, kept)
        known = label >= 0
        if old is None or not known.any():
            return None
        table = self._vectors.read(item, SIDES, kept[known]).select([f"{side}_vector" for side in SIDES])
        table = table.append_column("label", pa.array(label[known]))
        return group[known], table.append_column("old", vector_column(old[known].astype(np.float16)))


class DriftWorker:
    """Measures the group that is the unit's number."""

    def __init__(self, sample: Artifact, parts: Sequence[Part], features: Features) -> None:
        self._sample, self._parts, self._features = sample, parts, features

    def process(self, unit: Unit) -> Receipt:
        table = read_bucket(self._sample, self._parts, unit.number)
        found = None
        if table is not None:
            found = group_drift(
                table["label"].to_numpy(),
                vector_values(table["old"]),
                feature_vectors(table, self._features),
                *(vector_values(table[f"{side}_vector"]) for side in SIDES),
            )
        return Receipt(unit=unit.number, fingerprint="", details={"drift": None if found is None else asdict(found)})
