"""Units of the clustering passes: consecutive corpus units, so many that neither memory nor receipts grow too large."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from clusterbatch.corpus.units import CorpusUnit, corpus_units
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Manifest, Part
from clusterbatch.store.tables import read_parquet

# More tasks than this and the bucket offsets in their receipts would become large themselves.
_MOST_TASKS = 4096


@dataclass(frozen=True)
class TaskUnit:
    """A corpus unit and the part that holds its vectors."""

    unit: CorpusUnit
    embeddings: Part


def tasks(corpus: Manifest, embeddings: Manifest) -> list[Unit]:
    """All tasks; they follow from the two manifests alone. Payload: list[TaskUnit]."""
    units = corpus_units(corpus)
    if len(embeddings.parts) < len(units):
        raise DataError(f"embeddings: {len(embeddings.parts)} parts for {len(units)} units of the corpus")
    pairs = [TaskUnit(unit, part) for unit, part in zip(units, embeddings.parts, strict=False)]
    least_rows = sum(unit.rows for unit in units) / _MOST_TASKS
    found: list[Unit] = []
    waiting: list[TaskUnit] = []
    for pair in pairs:
        waiting.append(pair)
        rows = sum(item.unit.rows for item in waiting)
        if rows >= least_rows or pair is pairs[-1]:
            found.append(Unit(len(found), rows, waiting))
            waiting = []
    return found


def read_vectors(embeddings: Artifact, item: TaskUnit, columns: list[str]) -> pa.Table:
    """Vector columns of a unit; raises DataError where the part does not have the unit's rows."""
    table = read_parquet(embeddings.folder, item.embeddings.path, columns)
    if table.num_rows != item.unit.rows:
        raise DataError(
            f"{embeddings.folder.uri}/{item.embeddings.path}: {table.num_rows} rows, but unit {item.unit.number} of "
            f"the corpus has {item.unit.rows}"
        )
    return table
