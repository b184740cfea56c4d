"""The row groups of a corpus: what later stages read at once, numbered through the corpus.

A row that a later version of the corpus has dropped stays in its file, and a list beside its part names it; readers of
that version skip it. So row groups keep their numbers in all versions, and what was made for a row group of one version
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
from clusterbatch.store.tables import Footer, read_parquet

# The role of those parts of a corpus that hold its pairs; others hold rejects, for example.
PAIRS = "pairs"


@dataclass(frozen=True)
class RowGroup:
    """Row group `index` of part `path`; `number` orders all row groups of a corpus.

    rows: without those that were dropped; stored: with them; first: the position in the part of the first stored row;
    deleted: the file that lists the part's dropped rows, None if none of this row group is among them; footer: the
    part's.
    """

    number: int
    path: str
    index: int
    rows: int
    stored: int
    first: int
    deleted: str | None = None
    footer: Footer | None = None


def row_groups_of(manifest: Manifest) -> list[RowGroup]:
    """Return all row groups of a committed corpus, in order; they depend on its manifest alone."""
    groups: list[RowGroup] = []
    for part in manifest.parts:
        if part.details.get("role") != PAIRS:
            continue
        stored_rows = part.details["row_groups"]
        dropped_rows = part.details.get("deleted_rows", [0] * len(stored_rows))
        first, footer = 0, Footer.of(part)
        for index, (stored, dropped) in enumerate(zip(stored_rows, dropped_rows, strict=True)):
            deleted = part.details["deleted"] if dropped else None
            groups.append(RowGroup(len(groups), part.path, index, stored - dropped, stored, first, deleted, footer))
            first += stored
    return groups


def read_row_group(corpus: Artifact, group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of one row group, in file order. Raises DataError if the part is missing or damaged."""
    table = read_parquet(corpus.folder, group.path, columns, [group.index], group.footer)
    return table if group.deleted is None else table.take(pa.array(live_rows(corpus, group)))


def live_rows(corpus: Artifact, group: RowGroup) -> np.ndarray:
    """Return which of the stored rows were not dropped: (group.rows,) int64 positions in the row group, ascending."""
    live = np.ones(group.stored, bool)
    if group.deleted is not None:
        dropped = deleted_rows(corpus.folder, group.deleted)
        inside = dropped[np.searchsorted(dropped, group.first) : np.searchsorted(dropped, group.first + group.stored)]
        live[inside - group.first] = False
    return np.flatnonzero(live)


# Files of versions never change, and the row groups of one part are read one after the other.
@lru_cache(maxsize=4)
def deleted_rows(folder: Folder, path: str) -> np.ndarray:
    """Return the dropped rows of one part: (n,) int64 positions in the part, ascending."""
    rows: np.ndarray = read_parquet(folder, path, ["row"])["row"].to_numpy()
    return rows


def take_live(corpus: Artifact, group: RowGroup, table: pa.Table, deleted: str | None, place: str) -> pa.Table:
    """Return the rows of `group` out of a table that was made for it when its list of dropped rows was `deleted`.

    place: of the table, for messages. Raises DataError if it does not have as many rows as the row group had then.
    """
    then = replace(group, deleted=deleted)
    held = live_rows(corpus, then)
    if table.num_rows != len(held):
        raise DataError(f"{place}: {table.num_rows} rows, but row group {group.number} of the corpus has {len(held)}")
    if group.deleted == deleted:
        return table
    return table.take(pa.array(np.searchsorted(held, live_rows(corpus, group))))
