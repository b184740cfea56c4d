"""Rows between a file and the corpus: canonical columns by name, and rejects with their reasons."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import ColumnsConfig, CorpusConfig
from clusterbatch.corpus.inputs import source_of
from clusterbatch.errors import DataError
from clusterbatch.schema import CORPUS_OPTIONAL
from clusterbatch.store.artifact import Receipt

_MOST_CONTENT = 2_000

TEXT_COLUMNS = ("query", "document")
# Null in these means that the row does not say; in the text columns it is an error.
COLUMN_TYPES: dict[str, pa.DataType] = {
    "query": pa.string(),
    "document": pa.string(),
    "source": pa.string(),
    "pair_id": pa.string(),
    "negatives": pa.list_(pa.string()),
    "weight": pa.float32(),
    "group": pa.string(),
    "document_id": pa.string(),
    "score": pa.float32(),
    "negative_scores": pa.list_(pa.float32()),
    "document_vector": pa.list_(pa.float32()),
    "query_vector": pa.list_(pa.float32()),
}

REJECTED = pa.schema(
    [
        pa.field("slice", pa.int64()),
        # Zero-based position in the slice; null for what cannot be read of a file.
        pa.field("position", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("content", pa.string()),
    ]
)
# Not `empty_table()`, which imports pandas: a run must say within a second or two what it cannot read.
NOTHING = pa.Table.from_batches([], schema=REJECTED)


class BrokenFileError(DataError):
    """A file, or the rest of it, cannot be read at all; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Reject:
    """A row that is not taken, or with `row` None a whole file."""

    row: int | None
    reason: str
    content: str | None = None


@dataclass
class Chunk:
    """Rows read from one place of a file.

    rows: (n,) int64 positions in the slice, one for each pair: a row with several documents is several pairs. Each
    column has n values. absent: columns besides the texts that no row so far has, None if that is not known.
    """

    rows: np.ndarray
    columns: dict[str, pa.Array]
    rejects: list[Reject] = field(default_factory=list)
    absent: frozenset[str] | None = None

    @property
    def input_rows(self) -> int:
        """The number of rows of the input that the chunk is made of."""
        refused = [reject.row for reject in self.rejects if reject.row is not None]
        return len(np.union1d(self.rows, np.array(refused, np.int64)))


@dataclass(frozen=True)
class InputColumns:
    """The columns of an input file, by their names there.

    names: of each canonical column that is one column there; offered: those that need not be there; negatives,
    negative_scores: one or several columns each; constants: columns that folders (`key=value`) give to all rows, unless
    the file has them.
    """

    names: Mapping[str, str]
    negatives: Sequence[str]
    images: Sequence[str]
    offered: frozenset[str] = frozenset()
    constants: Mapping[str, str | None] = field(default_factory=dict)
    negative_scores: Sequence[str] = ()

    @property
    def left_out(self) -> list[str]:
        """Columns that a single record of JSON Lines may lack: all but the texts."""
        named = [given for name, given in self.names.items() if name not in TEXT_COLUMNS]
        listed = [*self.negatives, *self.negative_scores]
        return [given for given in [*named, *listed] if given not in self.offered and given not in self.constants]

    @staticmethod
    def of(config: CorpusConfig, constants: Mapping[str, str | None] | None = None) -> InputColumns:
        """Return what a configuration asks of a file below folders that give `constants`."""
        columns = config.columns
        keys = ("query", "document", "source", "pair_id", "weight", "group", "document_id", "score")
        names = {name: getattr(columns, name) for name in keys if getattr(columns, name) is not None}
        if columns.vector is not None:
            names |= {"document_vector": columns.vector, "query_vector": columns.query_vector or columns.vector}
        offered: frozenset[str] = frozenset()
        if config.source is not None:
            # One name for all rows: a column is not even read.
            names.pop("source", None)
        elif columns.source is None:
            names["source"] = "source"
            offered = frozenset({"source"})
        return InputColumns(names, columns.negatives, columns.images, offered, constants or {}, columns.negative_scores)


def optional_columns(columns: ColumnsConfig) -> list[str]:
    """Return the optional corpus columns that a configuration fills; the same for all files, so that parts agree."""
    return [name for name in CORPUS_OPTIONAL if getattr(columns, name)]


def check_columns(present: Sequence[str], columns: InputColumns) -> None:
    """Raise BrokenFileError if a file lacks a column that the configuration names, or has it twice."""
    wanted = [*columns.names.values(), *columns.negatives, *columns.negative_scores]
    missing = [
        name
        for name in dict.fromkeys(wanted)
        if name not in present and name not in columns.offered and name not in columns.constants
    ]
    if missing:
        names = (name if name.isprintable() else ascii(name) for name in present[:12])
        has = ", ".join(name[:40] for name in names) or "no columns"
        raise BrokenFileError(f"no column {', '.join(missing)} (has: {has}); name the columns with corpus.columns")
    twice = [name for name, count in Counter(present).items() if count > 1 and name in wanted]
    if twice:
        raise BrokenFileError(f"column {twice[0]} occurs twice in the file")


def shown(content: Any) -> str:
    """Return a row as JSON text for the rejects: cut, with what is not Unicode escaped."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MOST_CONTENT else text[: _MOST_CONTENT - 1] + "…"


def rejected(slices: np.ndarray, positions: np.ndarray | None, rejects: Sequence[Reject]) -> pa.Table:
    """Return a table of `REJECTED`; `slices` and `positions` are (n,) int64, None if whole files are rejected."""
    columns = {
        "slice": pa.array(slices, pa.int64()),
        "position": pa.nulls(len(rejects), pa.int64()) if positions is None else pa.array(positions, pa.int64()),
        "reason": [reject.reason for reject in rejects],
        "content": [reject.content for reject in rejects],
    }
    return pa.table(columns, schema=REJECTED)


def broken_files(receipts: Iterable[Receipt], more: Iterable[tuple[int, str, str]] = ()) -> pa.Table:
    """Return what the items of pass 1 could not read, and `more`, as `REJECTED`: one row for each file and reason.

    Every slice that breaks gives its reason, as a file may be sound before and after it; one that is broken as a whole
    gives the same reason in all its slices.
    """
    first: dict[tuple[str, str], int] = {}
    told = [broken for receipt in receipts for broken in receipt.details.get("broken", [])]
    for number, file, reason in [*told, *more]:
        first.setdefault((file, reason), number)
    slices = np.fromiter(first.values(), np.int64, len(first))
    return rejected(slices, None, [Reject(None, reason) for _, reason in first])


def files_without_columns(receipts: Iterable[Receipt]) -> list[tuple[int, str, str]]:
    """Return slice, file and reason for each data set in JSON Lines in which no row has a column that is named.

    A single row may lack it, and a single slice or part of a data set too, because writers leave nulls out; a name that
    no row knows is a mistake, as in other formats. The file is the first part of its data set.
    """
    absent: dict[tuple[str, str], set[str]] = {}
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for receipt in receipts:
        for number, file, columns in receipt.details.get("absent", []):
            place = (posixpath.dirname(file), source_of(file))
            absent[place] = absent.get(place, set(columns)) & set(columns)
            first[place] = min((number, file), first.get(place, (number, file)))
    return [
        (*first[place], f"no column {', '.join(sorted(columns))} in any row; name the columns with corpus.columns")
        for place, columns in absent.items()
        if columns
    ]
