"""What the passes of mining do with a unit: rows meet by source, then blocks of queries are searched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.batches.permutation import mix
from clusterbatch.clustering.groups import Groups, row_hashes
from clusterbatch.clustering.tasks import TaskUnit
from clusterbatch.clustering.vectors import SIDES, VectorSource, vector_values
from clusterbatch.config import MineConfig, RunConfig
from clusterbatch.corpus.units import read_unit
from clusterbatch.mining.choose import choose_negatives
from clusterbatch.mining.neighbours import GroupKeys, neighbours
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import iterate_bucket, write_buckets
from clusterbatch.store.workspace import Workspace


class GatherWorker:
    """Writes a task's vectors and texts, each bucketed by source."""

    def __init__(self, config: RunConfig, generation: int, groups: Groups, output: Artifact, fingerprint: str) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation)
        self._groups, self._output, self._fingerprint = groups, output, fingerprint
        self._seed = config.mine.seed

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        read = [self._rows(unit.number, item) for item in unit.payload]
        group = np.concatenate([groups for groups, _, _ in read])
        rows = np.bincount(group, minlength=len(self._groups.names)).tolist()
        parts = [
            write_buckets(
                self._output, unit.number, pa.concat_tables(tables), group, len(rows), holds=holds, rows_of=rows
            )
            for holds, tables in (("vectors", [t for _, t, _ in read]), ("texts", [t for _, _, t in read]))
        ]
        counts = Counts(read=unit.rows, written=unit.rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=parts, counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt

    def _rows(self, task: int, item: TaskUnit) -> tuple[np.ndarray, pa.Table, pa.Table]:
        rows = read_unit(self._corpus, item.unit, ["pair_id", "source", "query_hash", "document_hash", "document"])
        vectors = self._vectors.read(item, SIDES)
        table = pa.table(
            {
                "task": np.full(rows.num_rows, task),
                "unit": np.full(rows.num_rows, item.unit.number),
                "row": np.arange(rows.num_rows),
                "draw": row_hashes(rows["pair_id"], self._seed + 3),
                **{name: rows[name] for name in ("query_hash", "document_hash")},
                **{name: vectors[name] for name in ("query_vector", "document_vector")},
            }
        )
        return self._groups.of_rows(rows["source"]), table, rows.select(["document"])


@dataclass(frozen=True)
class Block:
    """The queries of one group that lie in parts [first, stop) of what was gathered."""

    group: int
    first: int
    stop: int


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
        self._config, self._gathered = config, gathered
        self._vectors, self._texts, self._tasks = vectors, texts, tasks
        self._output, self._fingerprint = output, fingerprint
        self._keys: tuple[int, GroupKeys] | None = None

    def process(self, unit: Unit) -> Receipt:
        watch, block = Stopwatch(), unit.payload
        own = self._vectors[block.first : block.stop]
        rows = pa.concat_tables(iterate_bucket(self._gathered, own, block.group))
        query_hash = rows["query_hash"].to_numpy()
        # Enough that what is left after the filters can still be chosen from.
        depth = self._config.last if self._config.negatives else 1
        found = neighbours(
            vector_values(rows["query_vector"]),
            query_hash,
            vector_values(rows["document_vector"]),
            self._documents(block.group),
            self._group_keys(block.group),
            depth,
        )
        columns = {"unit": rows["unit"], "row": rows["row"], "rank": found.rank.astype(np.int32)}
        negatives = 0
        if self._config.negatives:
            draws = _draws(rows["draw"].to_numpy(), depth)
            chosen = choose_negatives(found.ranking.scores, found.positive, draws, self._config)
            documents = np.where(chosen < 0, -1, np.take_along_axis(found.ranking.documents, np.maximum(chosen, 0), 1))
            negatives = int((documents >= 0).sum())
            columns["negatives"] = self._texts_of(block.group, documents)
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

    def _documents(self, group: int) -> Iterator[np.ndarray]:
        for piece in iterate_bucket(self._gathered, self._vectors, group):
            yield vector_values(piece["document_vector"])

    def _group_keys(self, group: int) -> GroupKeys:
        """Kept for the next block, which is often of the same group."""
        if self._keys is None or self._keys[0] != group:
            pieces = [
                (piece["query_hash"].to_numpy(), piece["document_hash"].to_numpy())
                for piece in iterate_bucket(self._gathered, self._vectors, group)
            ]
            self._keys = group, GroupKeys(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
        return self._keys[1]

    def _texts_of(self, group: int, documents: np.ndarray) -> pa.ListArray:
        """The texts of (Q, n) rows of a group as (Q,) lists; -1 stands for none."""
        wanted = np.unique(documents[documents >= 0])
        texts: list[pa.ChunkedArray] = []
        start = 0
        for piece in iterate_bucket(self._gathered, self._texts, group):
            here = wanted[(wanted >= start) & (wanted < start + piece.num_rows)] - start
            texts.append(piece["document"].take(pa.array(here)))
            start += piece.num_rows
        column = pa.chunked_array([chunk for each in texts for chunk in each.chunks], pa.string())
        present = documents >= 0
        place = np.searchsorted(wanted, documents[present])
        offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), column.take(pa.array(place)).combine_chunks())


def _draws(keys: np.ndarray, count: int) -> np.ndarray:
    """(Q, count) uniform in [0, 1), from (Q,) uint64 hashes of the rows: not from their order."""
    with np.errstate(over="ignore"):
        spread = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mix(spread) >> np.uint64(11)) * 2.0**-53
