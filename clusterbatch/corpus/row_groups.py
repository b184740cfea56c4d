"""The fixed units in which later stages read the corpus: one row group of one part, numbered through the corpus.

A row that a later version of the corpus has dropped stays where it is, and a list beside its part names it; readers of
that version pass over it. So units keep their numbers in all versions, and what was made for the unit of one version
(its vectors) can be read for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Artifact, Manifest
from clusterbatch.store.folder import Folder
from clusterbatch.store.tables import read_parquet

# The role of those parts of a corpus that hold its pairs; others hold rejects.
PAIRS = "pairs"


@dataclass(frozen=True)
class CorpusUnit:
    """Row group `row_group` of part `path`; `number` orders all units of a corpus.

    rows: that are there; stored: with those that were dropped; first: of the part's stored rows, the group's first;
    deleted: the file that lists the part's dropped rows, None where none of this group is among them.
    """

    number: int
    path: str
    row_group: int
    rows: int
    stored: int
    first: int
    deleted: str | None = None


def corpus_units(manifest: Manifest) -> list[CorpusUnit]:
    """All units of a committed corpus, in order; they depend on its manifest alone."""
    units: list[CorpusUnit] = []
    for part in manifest.parts:
        if part.details.get("role") != PAIRS:
            continue
        groups = part.details["row_groups"]
        gone = part.details.get("deleted_rows", [0] * len(groups))
        first = 0
        for group, (stored, dropped) in enumerate(zip(groups, gone, strict=True)):
            deleted = part.details["deleted"] if dropped else None
            units.append(CorpusUnit(len(units), part.path, group, stored - dropped, stored, first, deleted))
            first += stored
    return units


def read_unit(corpus: Artifact, unit: CorpusUnit, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one unit, in file order. Raises DataError where the part is missing or damaged."""
    table = read_parquet(corpus.folder, unit.path, columns, [unit.row_group])
    return table if unit.deleted is None else table.take(pa.array(live_rows(corpus, unit)))


def live_rows(corpus: Artifact, unit: CorpusUnit) -> np.ndarray:
    """(unit.rows,) int64, ascending: which of the stored rows are there, numbered inside the unit."""
    live = np.ones(unit.stored, bool)
    if unit.deleted is not None:
        dropped = deleted_rows(corpus.folder, unit.deleted)
        inside = dropped[np.searchsorted(dropped, unit.first) : np.searchsorted(dropped, unit.first + unit.stored)]
        live[inside - unit.first] = False
    return np.flatnonzero(live)


# Files of versions never change; the units of one part come one after the other.
@lru_cache(maxsize=4)
def deleted_rows(folder: Folder, path: str) -> np.ndarray:
    """(n,) int64, ascending: the dropped rows of one part, numbered through it."""
    rows: np.ndarray = read_parquet(folder, path, ["row"])["row"].to_numpy()
    return rows


def take_live(corpus: Artifact, unit: CorpusUnit, table: pa.Table, deleted: str | None, place: str) -> pa.Table:
    """The rows of `unit` out of a table that was made for it when its list of dropped rows was `deleted`.

    place: of the table, for messages. Raises DataError where it has not as many rows as the unit had then.
    """
    then = replace(unit, deleted=deleted)
    held = live_rows(corpus, then)
    if table.num_rows != len(held):
        raise DataError(f"{place}: {table.num_rows} rows, but unit {unit.number} of the corpus has {len(held)}")
    return table if unit.deleted == deleted else table.take(pa.array(np.searchsorted(held, live_rows(corpus, unit))))
