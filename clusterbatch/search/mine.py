"""The stage `mine`: gathers rows by source, searches, keeps what was found for each row, for `cluster` to take.

What mining does with a block of queries whose neighbours it searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import MineConfig, RunConfig, fingerprint
from clusterbatch.corpus.groups import source_groups
from clusterbatch.embedding.stage import embedding_pool
from clusterbatch.embedding.vectors import tasks
from clusterbatch.errors import UsageError
from clusterbatch.hashing import mix
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.search.gather import TEXTS, VECTORS, Gathered, GatherWorker, blocks
from clusterbatch.search.negatives import choose_negatives
from clusterbatch.search.neighbours import Approximation
from clusterbatch.store import Artifact, Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import iterate_bucket, read_bucket, write_buckets
from clusterbatch.store.workspace import Workspace


class MineWorker:
    """Searches the queries of a block; writes what was found for each row, bucketed by the task that it came from."""

    def __init__(
        self,
        config: MineConfig,
        gathered: Artifact,
        vectors: Sequence[Part],
        texts: Sequence[Part],
        tasks: int,
        output: Artifact,
        fingerprint: str,
    ) -> None:
        torch.set_num_threads(1)
        self._config, self._artifact = config, gathered
        self._gathered = Gathered(gathered, vectors, Approximation.of(config))
        self._texts, self._tasks = texts, tasks
        self._output, self._fingerprint = output, fingerprint

    def process(self, unit: Unit) -> Receipt:
        watch, block = Stopwatch(), unit.payload
        rows = self._gathered.rows(block)
        # Enough that what is left after the filters can still be chosen from.
        depth = self._config.last if self._config.negatives else 1
        found = self._gathered.search(block.group, rows, depth, self._config.consistency or 0)
        columns = {"unit": rows["unit"], "row": rows["row"], "rank": found.rank.astype(np.int32)}
        negatives = 0
        if self._config.negatives:
            draws = _draws(rows["draw"].to_numpy(), depth)
            chosen = choose_negatives(found.ranking.scores, found.positive, draws, self._config)
            documents = np.where(chosen < 0, -1, np.take_along_axis(found.ranking.documents, np.maximum(chosen, 0), 1))
            negatives = int((documents >= 0).sum())
            columns["negatives"] = self._texts_of(block.group, documents)
            if self._config.margins:
                margins = found.positive[:, None] - np.take_along_axis(found.ranking.scores, np.maximum(chosen, 0), 1)
                columns["margins"] = _lists(documents >= 0, pa.array(margins[documents >= 0], pa.float32()))
        task = rows["task"].to_numpy()
        part = write_buckets(self._output, unit.number, pa.table(columns), task, self._tasks)
        consistency = self._config.consistency
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=len(task), written=len(task)),
            seconds=watch.seconds,
            details={
                "negatives": negatives,
                "inconsistent": 0 if consistency is None else int((found.rank >= consistency).sum()),
                "first": int((found.rank == 0).sum()),
            },
        )
        self._output.write_receipt(receipt)
        return receipt

    def _texts_of(self, group: int, documents: np.ndarray) -> pa.ListArray:
        """The texts of (Q, n) rows of a group as (Q,) lists; -1 stands for none."""
        wanted = np.unique(documents[documents >= 0])
        texts: list[pa.ChunkedArray] = []
        start = 0
        for piece in iterate_bucket(self._artifact, self._texts, group):
            here = wanted[(wanted >= start) & (wanted < start + piece.num_rows)] - start
            texts.append(piece["document"].take(pa.array(here)))
            start += piece.num_rows
        column = pa.chunked_array([chunk for each in texts for chunk in each.chunks], pa.string())
        present = documents >= 0
        place = np.searchsorted(wanted, documents[present])
        return _lists(present, column.take(pa.array(place)).combine_chunks())


def _lists(present: np.ndarray, values: pa.Array) -> pa.ListArray:
    """(Q,) lists of `values`, which are those that are `present` (Q, n), row by row."""
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _draws(keys: np.ndarray, count: int) -> np.ndarray:
    """(Q, count) uniform in [0, 1), from (Q,) uint64 hashes of the rows: not from their order."""
    with np.errstate(over="ignore"):
        spread = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mix(spread) >> np.uint64(11)) * 2.0**-53


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
