"""Units of the clustering passes: consecutive corpus units, so many that buckets are not read in too small pieces."""

from __future__ import annotations

from dataclasses import dataclass

from clusterbatch.corpus.units import CorpusUnit, corpus_units
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Manifest, Part

# Each bucket is read from every task's file: with 10^9 pairs in shards of 256 MiB, about 64 KiB at a time.
MOST_TASKS = 4096


@dataclass(frozen=True)
class TaskUnit:
    """A corpus unit, and the part that holds its vectors where they are kept."""

    unit: CorpusUnit
    embeddings: Part | None


def tasks(corpus: Manifest, embeddings: Manifest) -> list[Unit]:
    """All tasks; they follow from the two manifests alone. Payload: list[TaskUnit]."""
    units = corpus_units(corpus)
    kept = embeddings.details.get("persisted", True)
    parts: list[Part | None] = list(embeddings.parts) if kept else [None] * len(units)
    if len(parts) < len(units):
        raise DataError(f"embeddings: {len(parts)} parts for {len(units)} units of the corpus")
    least_rows = sum(unit.rows for unit in units) / MOST_TASKS
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
