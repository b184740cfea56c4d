"""The surrogate's vectors of corpus units: those the stage `embed` kept, or computed when they are needed.

Units of the clustering passes: consecutive corpus units, as many as memory allows and large corpora want.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.row_groups import RowGroup, row_groups_of, take_live
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Manifest, Part
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

# Each bucket is read from every task's file, so large corpora are better cut into few large tasks. But a worker holds a
# task's rows, with text, tokens and vectors, about twice: a few hundred megabytes, whatever the corpus' size.
_MOST_TASKS, _MOST_ROWS = 4096, 2**17


@dataclass(frozen=True)
class TaskUnit:
    """A corpus unit, and the part that holds its vectors where they are kept."""

    unit: RowGroup
    embeddings: Part | None


def task_rows(rows: int) -> float:
    """Rows that a task has at least, in a corpus of `rows`; it ends with the unit that completes them."""
    return min(rows / _MOST_TASKS, _MOST_ROWS)


def tasks(corpus: Manifest, embeddings: Manifest | None) -> list[Unit]:
    """All tasks; they follow from the two manifests alone. Payload: list[TaskUnit].

    embeddings: None where none were made.
    """
    units = row_groups_of(corpus)
    parts: list[Part | None] = [None] * len(units)
    if embeddings is not None and embeddings.details.get("persisted", True):
        parts = list(embeddings.parts)
    if len(parts) < len(units):
        raise DataError(f"embeddings: {len(parts)} parts for {len(units)} units of the corpus")
    least_rows = task_rows(sum(unit.rows for unit in units))
    found: list[Unit] = []
    waiting: list[TaskUnit] = []
    rows = 0
    for unit, part in zip(units, parts, strict=False):
        waiting.append(TaskUnit(unit, part))
        rows += unit.rows
        if rows >= least_rows or unit is units[-1]:
            found.append(Unit(len(found), rows, waiting))
            waiting, rows = [], 0
    return found


if TYPE_CHECKING:
    from clusterbatch.embedding.embedder import UnitEmbedder

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")


class VectorSource:
    """Made in the worker that needs it: where vectors were not kept, it loads the model's weights."""

    def __init__(self, config: RunConfig, generation: int) -> None:
        self._config, self._generation = config, generation
        workspace = Workspace(config)
        self._corpus, self._folder = workspace.corpus, workspace.embeddings(generation).folder

    def read(self, item: TaskUnit, sides: Sequence[Side], rows: np.ndarray | None = None) -> pa.Table:
        """pair_id, source and `<side>_vector` of a unit's rows, or of some (row numbers inside the unit)."""
        if item.embeddings is None:
            return self._embedded(item, sides, rows)
        columns = ["pair_id", "source", *(f"{side}_vector" for side in sides)]
        part = item.embeddings
        table = read_parquet(self._folder, part.path, columns)
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
        # Passes that only read vectors start faster without torch.
        from clusterbatch.embedding.embedder import UnitEmbedder

        return UnitEmbedder(self._config, self._generation)


def _refuse_infinite(table: pa.Table, side: Side, place: str) -> None:
    """Raise DataError that names a row whose vector is not finite: centroids and scores would all be spoilt by it."""
    finite = np.isfinite(vector_values(table[f"{side}_vector"])).all(axis=1)
    if not finite.all():
        row = table["pair_id"][int(np.argmin(finite))].as_py()
        raise DataError(f"{place}: the {side} vector of row {row} is not finite; embed the corpus again")


def vector_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """(rows, dimensions) as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def vector_values(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """(rows, dimensions) of a column of fixed-size lists, in its own number type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
