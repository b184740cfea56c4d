"""The surrogate's vectors of corpus units: those the stage `embed` kept, or computed when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.tasks import TaskUnit
from clusterbatch.config import RunConfig
from clusterbatch.corpus.units import take_live
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

if TYPE_CHECKING:
    from clusterbatch.encoder.embedder import UnitEmbedder

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
        from clusterbatch.encoder.embedder import UnitEmbedder

        return UnitEmbedder(self._config, self._generation)


def vector_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """(rows, dimensions) as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def vector_values(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """(rows, dimensions) of a column of fixed-size lists, in its own number type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
