"""The surrogate's vectors of the corpus: read if the stage `embed` stored them, otherwise computed when needed.

Passes over the corpus work on *tasks*: consecutive row groups, as many as memory allows and large corpora need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.row_groups import RowGroup, row_groups_of, take_live
from clusterbatch.encoder.sides import SIDES, Side
from clusterbatch.errors import DataError
from clusterbatch.runtime import WorkItem
from clusterbatch.store.artifact import Manifest, Part
from clusterbatch.store.details import has_vectors
from clusterbatch.store.tables import read_parquet, vector_column, vector_values
from clusterbatch.store.workspace import Workspace

if TYPE_CHECKING:
    from clusterbatch.embedding.embedder import UnitEmbedder

__all__ = ["SIDES", "Side", "TaskUnit", "VectorSource", "task_rows", "tasks", "vector_column", "vector_values"]

# Every bucket is read from every task's file: a shuffle asks storage for as many ranges as tasks times buckets, and
# buckets grow with the rows. Tasks grow with their square root: enough of them for many workers and for a crash to cost
# little. A worker holds a task's rows, with text, tokens and vectors, about twice: a few hundred megabytes at most.
_ROWS_FACTOR, _MOST_ROWS = 4, 2**17


@dataclass(frozen=True)
class TaskUnit:
    """A row group of the corpus, and the part that holds its vectors if they are stored."""

    unit: RowGroup
    embeddings: Part | None


def task_rows(rows: int) -> float:
    """Return the least rows of a task in a corpus of `rows`; a task ends with the row group that completes them."""
    return min(_ROWS_FACTOR * math.sqrt(rows), _MOST_ROWS)


def tasks(corpus: Manifest, embeddings: Manifest | None) -> list[WorkItem]:
    """Return all tasks; they follow from the two manifests alone. Payload: list[TaskUnit]; covers: their row groups.

    embeddings: None if there are none. Raises DataError if row groups of the corpus have no vectors.
    """
    groups = row_groups_of(corpus)
    parts: list[Part | None] = [None] * len(groups)
    if embeddings is not None and has_vectors(embeddings):
        parts = list(embeddings.parts)
    if len(parts) < len(groups):
        raise DataError(f"embeddings: {len(parts)} parts for {len(groups)} units of the corpus")
    least_rows = task_rows(sum(group.rows for group in groups))
    items: list[WorkItem] = []
    waiting: list[TaskUnit] = []
    rows = 0
    for group, part in zip(groups, parts, strict=False):
        waiting.append(TaskUnit(group, part))
        rows += group.rows
        if rows >= least_rows or group is groups[-1]:
            first = waiting[0].unit.number
            items.append(WorkItem(len(items), rows, waiting, (first, group.number + 1) if first < group.number else ()))
            waiting, rows = [], 0
    return items


class VectorSource:
    """Vectors of row groups. Made in the worker that needs it: it loads the model if vectors are not stored."""

    def __init__(self, config: RunConfig, generation: int) -> None:
        self._config, self._generation = config, generation
        workspace = Workspace(config)
        self._corpus, self._folder = workspace.corpus, workspace.embeddings(generation).folder

    def read(self, item: TaskUnit, sides: Sequence[Side], rows: np.ndarray | None = None) -> pa.Table:
        """Return pair_id, source and `<side>_vector` of a row group's rows, or of some (row numbers inside it)."""
        if item.embeddings is None:
            return self._embedded(item, sides, rows)
        columns = ["pair_id", "source", *(f"{side}_vector" for side in sides)]
        part = item.embeddings
        table = read_parquet(self._folder, part, columns)
        # The corpus may have dropped rows since.
        place = f"{self._folder.uri}/{part.path}"
        table = take_live(self._corpus, item.unit, table, part.details.get("deleted"), place)
        for side in sides:
            _refuse_infinite(table, side, place)
        return table if rows is None else table.take(pa.array(rows))

    def _embedded(self, item: TaskUnit, sides: Sequence[Side], rows: np.ndarray | None) -> pa.Table:
        embedded = self._embedder.embed(item.unit, rows=rows, sides=sides)
        table = embedded.rows.select(["pair_id", "source"])
        for side in sides:
            table = table.append_column(f"{side}_vector", vector_column(embedded.vectors[side]))
        return table

    @cached_property
    def _embedder(self) -> UnitEmbedder:
        # Imported here: passes that only read vectors start faster without torch.
        from clusterbatch.embedding.embedder import UnitEmbedder

        return UnitEmbedder(self._config, self._generation)


def _refuse_infinite(table: pa.Table, side: Side, place: str) -> None:
    """Raise DataError that names a row whose vector is not finite: centroids and scores would all be spoilt by it."""
    finite = np.isfinite(vector_values(table[f"{side}_vector"])).all(axis=1)
    if not finite.all():
        row = table["pair_id"][int(np.argmin(finite))].as_py()
        raise DataError(f"{place}: the {side} vector of row {row} is not finite; embed the corpus again")
