"""What mining does with a block of queries whose neighbours it searches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import MineConfig
from clusterbatch.mining.approximate import Approximation
from clusterbatch.mining.choose import choose_negatives
from clusterbatch.mining.gathering import Gathered
from clusterbatch.mixing import mix
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import iterate_bucket, write_buckets


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
