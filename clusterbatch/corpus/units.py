"""The fixed units in which later stages read the corpus: one row group of one part, numbered through the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from clusterbatch.store.artifact import Artifact, Manifest
from clusterbatch.store.tables import read_parquet

# The role of those parts of a corpus that hold its pairs; others hold rejects.
PAIRS = "pairs"


@dataclass(frozen=True)
class CorpusUnit:
    """Row group `row_group` of part `path`; `number` orders all units of a corpus."""

    number: int
    path: str
    row_group: int
    rows: int


def corpus_units(manifest: Manifest) -> list[CorpusUnit]:
    """All units of a committed corpus, in order; they depend on its manifest alone."""
    units: list[CorpusUnit] = []
    for part in manifest.parts:
        if part.details.get("role") != PAIRS:
            continue
        for group, rows in enumerate(part.details["row_groups"]):
            units.append(CorpusUnit(len(units), part.path, group, rows))
    return units


def read_unit(corpus: Artifact, unit: CorpusUnit, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one unit, in file order. Raises DataError where the part is missing or damaged."""
    return read_parquet(corpus.folder, unit.path, columns, [unit.row_group])
