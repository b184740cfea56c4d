"""The stage `mine`: gathers rows by source, searches, keeps what was found for each row, for `cluster` to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.tasks import tasks
from clusterbatch.config import MineConfig, RunConfig, fingerprint
from clusterbatch.encoder.placement import embedding_pool
from clusterbatch.errors import UsageError
from clusterbatch.mining.gathering import TEXTS, VECTORS, GatherWorker, blocks
from clusterbatch.mining.workers import MineWorker
from clusterbatch.runtime import Pool, ray_session, run_units
from clusterbatch.store import Artifact, Manifest, Part, Stopwatch
from clusterbatch.store.exchange import read_bucket
from clusterbatch.store.workspace import Workspace

_EXCHANGE = "_exchange"


def mine(config: RunConfig, *, generation: int = 0, force: bool = False, embedded: int | None = None) -> Manifest:
    """Searches every query of the embedded corpus among the documents of its source; at once when that is done.

    embedded: the generation whose embeddings are searched; unset: this one's.

    Details: negatives (how many), inconsistent (pairs beyond `mine.consistency`), first (pairs whose document is the
    nearest of its source). Raises UsageError where nothing is asked for.
    """
    if not config.mine.is_on:
        raise UsageError("mine: set mine.negatives or mine.consistency")
    workspace, embedded = Workspace(config), generation if embedded is None else embedded
    corpus, embeddings = workspace.corpus.require(), workspace.embeddings(embedded).require()
    identity = fingerprint("mined", config.mine, corpus.fingerprint, embeddings.fingerprint)
    artifact = workspace.mined(generation)
    if artifact.is_done(identity) and not force:
        artifact.folder.remove(_EXCHANGE)
        return artifact.require()
    watch = Stopwatch()
    done = artifact.begin(identity, force)
    groups = source_groups(corpus)
    units = tasks(corpus, embeddings)
    pool = Pool(config.mine.workers, config.mine.cpus_per_worker)
    exchange = Artifact(artifact.folder.child(_EXCHANGE), "rows by source")
    with ray_session(config.ray):
        arguments = {"output": exchange, "fingerprint": identity, "groups": groups}
        ready = exchange.begin(identity, force)
        gathering = {"config": config, "generation": embedded, **arguments}
        gathering_pool = pool if embeddings.details.get("persisted", True) else embedding_pool(config.embed)
        receipts = run_units("mine: gather", units, GatherWorker, gathering, gathering_pool, done=ready)
        vectors, texts = (
            [part for receipt in receipts for part in receipt.parts if part.details["holds"] == holds]
            for holds in (VECTORS, TEXTS)
        )
        searching = {
            "config": config.mine,
            "gathered": exchange,
            "vectors": vectors,
            "texts": texts,
            "tasks": len(units),
            "output": artifact,
            "fingerprint": identity,
        }
        receipts = run_units("mine: search", blocks(vectors, groups), MineWorker, searching, pool, done=done)
    totals = {key: sum(receipt.details[key] for receipt in receipts) for key in ("negatives", "inconsistent", "first")}
    manifest = artifact.commit(
        identity,
        receipts,
        config=config.mine.identity(),
        inputs={"corpus": corpus.fingerprint, "embeddings": embeddings.fingerprint},
        seconds=watch.seconds,
        details=totals,
    )
    artifact.folder.remove(_EXCHANGE)
    return manifest


def source_groups(corpus: Manifest) -> Groups:
    """Every source is searched by itself, as no batch mixes them."""
    sources: dict[str, int] = corpus.details["sources"]
    names = sorted(name for name, rows in sources.items() if rows)
    return Groups(names, np.array([sources[name] for name in names]), np.ones(len(names), np.int64))


@dataclass(frozen=True)
class Mined:
    """What was found for the rows of a committed stage. Picklable."""

    artifact: Artifact
    parts: Sequence[Part]
    config: MineConfig
    fingerprint: str
    inconsistent_share: float

    @staticmethod
    def of(config: RunConfig, generation: int) -> Mined:
        artifact = Workspace(config).mined(generation)
        manifest = artifact.require()
        share = manifest.details["inconsistent"] / max(1, manifest.counts.written)
        return Mined(artifact, manifest.parts, config.mine, manifest.fingerprint, share)

    def rows_of(self, task: int) -> pa.Table:
        """Columns unit, row, rank and, where there are some, negatives and margins, of all rows of a task, in order."""
        table = read_bucket(self.artifact, self.parts, task)
        assert table is not None, "every row was searched"
        return table.sort_by([("unit", "ascending"), ("row", "ascending")])
