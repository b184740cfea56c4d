"""The stage `score`: a teacher scores each query's own document, its hard negatives and its nearest in-cluster ones.

Scores are an artifact of their own beside the shards, of runs in the same order, so that another teacher needs no other
shards, and shards without scores stay as they are. A unit of work is a range of one shard's runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.encoder.devices import return_freed_memory
from clusterbatch.encoder.resolve import model_fingerprint
from clusterbatch.errors import DataError, UsageError
from clusterbatch.log import say
from clusterbatch.runtime import Pass, Pool, Result, WorkItem, ray_session
from clusterbatch.runtime.resources import device_for, gpus_for
from clusterbatch.scoring.candidates import find_candidates
from clusterbatch.scoring.teacher import check_teacher, load_teacher, teacher_folder, teacher_kind
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.layout import ROWS, SCORES
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.writer import RunFile, write_runs
from clusterbatch.store import Artifact, Counts, Manifest, Stopwatch
from clusterbatch.store.details import ScoredUnit, ScoresDetails, details_of
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

# Rows of small clusters that make up one unit of work: a cross-encoder takes minutes for them on a CPU.
_UNIT_ROWS = 1024


def score(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Score the rows of the clusters of `generation` with `score.teacher`; return at once if that is done.

    Raises UsageError if no teacher is named or it is of a kind that is not supported, DataError if its files cannot be
    loaded, all before any work.
    """
    if not config.score.is_on:
        raise UsageError("score: set score.teacher")
    workspace = Workspace(config)
    clusters = workspace.clusters(generation)
    inputs, artifact = clusters.require(), workspace.scores(generation)
    identity = planned_fingerprint(config, inputs.fingerprint)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    clusters.check_parts(inputs)
    check_teacher(config)
    watch = Stopwatch()
    done = artifact.begin(identity, force)
    reader = ShardReader(clusters)
    negatives = any(name.startswith("negative_") for name in reader.schema.names)
    items = score_units(reader.index, config.score.window)
    settings = config.score
    with ray_session(config.ray):
        device = device_for(settings.device)
        pool = Pool(
            settings.workers,
            settings.cpus_per_worker,
            gpus_for(settings.device, settings.workers, settings.gpus_per_worker),
        )
        arguments = {"config": config, "clusters": clusters, "negatives": negatives, "device": device}
        receipts = Pass("score", artifact, identity, ScoreWorker, arguments, pool).run(items, done=done)
    found = [details_of(receipt, ScoredUnit) for receipt in receipts]
    folder = teacher_folder(settings, config.storage)
    manifest = artifact.commit(
        identity,
        receipts,
        config=settings.identity(),
        inputs={"clusters": inputs.fingerprint},
        seconds=watch.seconds,
        details=ScoresDetails(
            teacher=model_fingerprint(folder),
            kind=teacher_kind(folder),
            negatives=negatives,
            candidates=sum(unit["candidates"] for unit in found),
            above=sum(unit["above"] for unit in found),
        ),
    )
    totals = details_of(manifest, ScoresDetails)
    say(
        f"score     {totals['candidates']:,} documents beside the rows' own; {totals['above']:,} of them score above "
        "these",
        candidates=totals["candidates"],
        above=totals["above"],
    )
    return manifest


def planned_fingerprint(config: RunConfig, clusters: str) -> str:
    """Return the fingerprint of the scores if they are made as `config` says, of clusters with that fingerprint."""
    model = model_fingerprint(teacher_folder(config.score, config.storage))
    return fingerprint("scores", config.score, model, clusters)


@dataclass(frozen=True)
class ScoreUnit:
    """Rows of one shard from run `first_run` and row `first_row` on; windows: rows of each window, in order.

    A window is a cluster's rows in this shard, or a part of them that begins with a run.
    """

    shard: int
    first_run: int
    first_row: int
    windows: Sequence[int]

    @property
    def rows(self) -> int:
        return sum(self.windows)


def score_units(index: ClusterIndex, window: int) -> list[WorkItem]:
    """Cut all rows into units of about `_UNIT_ROWS` rows, or one window of more; payload: `ScoreUnit`.

    A window has at most `window` rows, or one run.
    """
    # A window begins with a run, so it holds whole ones.
    largest = max(1, window // index.run_rows) * index.run_rows
    units: list[ScoreUnit] = []
    for opening in _windows(index, largest):
        last = units[-1] if units else None
        if last and last.shard == opening.shard and last.rows + opening.rows <= _UNIT_ROWS:
            units[-1] = replace(last, windows=[*last.windows, *opening.windows])
        else:
            units.append(opening)
    return [WorkItem(number, unit.rows, unit) for number, unit in enumerate(units)]


def _windows(index: ClusterIndex, largest: int) -> Iterator[ScoreUnit]:
    """Yield every window by itself, in the order of shards and of rows in these; larger clusters are cut evenly."""
    for piece in np.lexsort((index.first_row, index.shard)).tolist():
        rows = int(index.rows[piece])
        runs = np.linspace(0, -(-rows // index.run_rows), -(-rows // largest) + 1).astype(int)
        for run, end in pairwise(runs.tolist()):
            start, stop = run * index.run_rows, min(end * index.run_rows, rows)
            first_run, first_row = int(index.first_run[piece]) + run, int(index.first_row[piece]) + start
            yield ScoreUnit(int(index.shard[piece]), first_run, first_row, [stop - start])


class ScoreWorker:
    """Write the scores of a unit's rows, one run after the other; one unit is in memory at a time."""

    def __init__(self, config: RunConfig, clusters: Artifact, negatives: bool, device: str) -> None:
        if device == "cpu":
            # Ray's workers are told to use one thread each; one that was given more cores uses them.
            torch.set_num_threads(max(1, round(config.score.cpus_per_worker)))
        self._config, self._clusters, self._negatives = config.score, clusters, negatives
        self._reader = ShardReader(clusters)
        self._text = {
            part.details["shard"]: part for part in clusters.require().parts if part.details.get("content") == ROWS
        }
        self._teacher = load_teacher(config.score, config.storage, device)

    def process(self, item: WorkItem, output: Artifact) -> Result:
        unit: ScoreUnit = item.payload
        text = self._texts(unit, item.rows)
        candidates = find_candidates(self._runs(unit), text, unit.windows, self._config.nearest)
        query, document, pair_of_entry = candidates.pairs()
        found, encoded = self._teacher.scores(candidates.queries, candidates.documents, query, document)
        scores = found[pair_of_entry]
        rows = np.concatenate([np.arange(item.rows), candidates.row])
        self._check_finite(scores, rows, text)
        table = candidates.table(scores)
        file, start = RunFile(table.schema), 0
        for count in unit.windows:
            file.extend(table.slice(start, count), self._reader.index.run_rows)
            start += count
        parts = write_runs(
            output,
            f"unit-{item.number:08d}",
            {SCORES: file},
            item.rows,
            unit=item.number,
            shard=unit.shard,
            first_run=unit.first_run,
        )
        above = scores[item.rows :] > scores[candidates.row]
        details = ScoredUnit(candidates=len(candidates.row), above=int(above.sum()), encoded=encoded)
        return_freed_memory()
        return Result(parts, Counts(read=item.rows, written=item.rows), dict(details))

    def _runs(self, unit: ScoreUnit) -> pa.Table:
        count = sum(-(-rows // self._reader.index.run_rows) for rows in unit.windows)
        runs = np.arange(unit.first_run, unit.first_run + count)
        vectors = self._config.nearest > 0
        names = ["query_hash", "document_hash", *(["query_vector", "document_vector"] if vectors else [])]
        batches = self._reader.read_runs(unit.shard, runs, vectors=vectors)
        return pa.Table.from_batches([batch.select(names) for batch in batches]).combine_chunks()

    def _texts(self, unit: ScoreUnit, rows: int) -> pa.Table:
        """Read the texts of the unit's rows, of the row groups that hold some."""
        part = self._text[unit.shard]
        ends = np.cumsum(part.details["row_groups"])
        first, last = np.searchsorted(ends, [unit.first_row, unit.first_row + rows - 1], side="right").tolist()
        columns = ["pair_id", "query", "document", *(["negatives"] if self._negatives else [])]
        table = read_parquet(self._clusters.folder, part, columns, range(first, last + 1))
        before = int(ends[first - 1]) if first else 0
        return table.slice(unit.first_row - before, rows)

    def _check_finite(self, scores: np.ndarray, rows: np.ndarray, text: pa.Table) -> None:
        broken = rows[~np.isfinite(scores)]
        if len(broken):
            pair = text["pair_id"][int(broken[0])].as_py()
            raise DataError(
                f"score: a score of pair {pair} is not finite ({len(broken)} such scores here); the teacher's weights "
                "or score.dtype are not fit for it"
            )
