"""Units of the clustering passes: consecutive corpus units, as many as memory allows and large corpora want."""

from __future__ import annotations

from dataclasses import dataclass

from clusterbatch.corpus.units import CorpusUnit, corpus_units
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Manifest, Part

# Each bucket is read from every task's file, so large corpora are better cut into few large tasks. But a worker holds a
# task's rows, with text, tokens and vectors, about twice: a few hundred megabytes, whatever the corpus' size.
_MOST_TASKS, _MOST_ROWS = 4096, 2**17


@dataclass(frozen=True)
class TaskUnit:
    """A corpus unit, and the part that holds its vectors where they are kept."""

    unit: CorpusUnit
    embeddings: Part | None


def task_rows(rows: int) -> float:
    """Rows that a task has at least, in a corpus of `rows`; it ends with the unit that completes them."""
    return min(rows / _MOST_TASKS, _MOST_ROWS)


def tasks(corpus: Manifest, embeddings: Manifest | None) -> list[Unit]:
    """All tasks; they follow from the two manifests alone. Payload: list[TaskUnit].

    embeddings: None where none were made.
    """
    units = corpus_units(corpus)
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
