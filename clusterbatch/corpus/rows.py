"""Rejected rows between the passes of ingest: by slice, since positions in files are known only when all is read.

Rows on their way from a file to the corpus: canonical columns by name, and what cannot be one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import ColumnsConfig
from clusterbatch.errors import DataError
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
    "document_vector": pa.list_(pa.float32()),
    "query_vector": pa.list_(pa.float32()),
}


class BrokenFileError(DataError):
    """A file, or what follows in it, cannot be read at all; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Reject:
    """A row that is not taken, or with `row` None a whole file."""

    row: int | None
    reason: str
    content: str | None = None


@dataclass
class Chunk:
    """Rows read from one place of a file. `rows`: (n,) int64 positions in the slice; each column has n values."""

    rows: np.ndarray
    columns: dict[str, pa.Array]
    rejects: list[Reject] = field(default_factory=list)


def input_names(columns: ColumnsConfig) -> dict[str, str]:
    """The input's name of each canonical column that is one column there (negatives may be several)."""
    named = {name: getattr(columns, name) for name in ("query", "document", "source", "pair_id", "weight", "group")}
    if columns.vector is not None:
        named |= {"document_vector": columns.vector, "query_vector": columns.query_vector or columns.vector}
    return {name: value for name, value in named.items() if value is not None} | _offered(columns)


def _offered(columns: ColumnsConfig) -> dict[str, str]:
    """What is taken where a file has it, and not missed where it has not."""
    return {"source": "source"} if columns.source is None else {}


def optional_columns(columns: ColumnsConfig) -> list[str]:
    """The optional corpus columns that this configuration fills; the same for all files, so that parts agree."""
    return [name for name in ("negatives", "weight", "group") if getattr(columns, name)]


def check_columns(present: Sequence[str], columns: ColumnsConfig) -> None:
    """Raises BrokenFileError where a file lacks a column that the configuration names."""
    wanted = [*input_names(columns).values(), *columns.negatives]
    offered = _offered(columns).values()
    missing = [name for name in wanted if name not in present and name not in offered]
    if missing:
        names = (name if name.isprintable() else ascii(name) for name in present[:12])
        has = ", ".join(name[:40] for name in names) or "no columns"
        raise BrokenFileError(f"no column {', '.join(missing)} (has: {has}); name the columns with corpus.columns")


def shown(content: Any) -> str:
    """A row as JSON text, cut, with what is not Unicode escaped: for the rejects."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MOST_CONTENT else text[: _MOST_CONTENT - 1] + "…"


REJECTED = pa.schema(
    [
        pa.field("slice", pa.int64()),
        # Zero-based position in the slice; null where what cannot be read of a file is meant.
        pa.field("position", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("content", pa.string()),
    ]
)


NOTHING = REJECTED.empty_table()


def rejected(slices: np.ndarray, positions: np.ndarray | None, rejects: Sequence[Reject]) -> pa.Table:
    """A table of `REJECTED`; `slices` and `positions` are (n,) int64, no positions where files are meant."""
    columns = {
        "slice": pa.array(slices, pa.int64()),
        "position": pa.nulls(len(rejects), pa.int64()) if positions is None else pa.array(positions, pa.int64()),
        "reason": [reject.reason for reject in rejects],
        "content": [reject.content for reject in rejects],
    }
    return pa.table(columns, schema=REJECTED)


def broken_files(receipts: Iterable[Receipt]) -> pa.Table:
    """What the units of pass 1 could not read, a table of `REJECTED`: one row for each file and reason.

    Every slice that breaks tells why, for a file may be sound before and after it; one that is broken as a whole tells
    the same in all its slices.
    """
    first: dict[tuple[str, str], int] = {}
    for receipt in receipts:
        for number, file, reason in receipt.details.get("broken", []):
            first.setdefault((file, reason), number)
    slices = np.fromiter(first.values(), np.int64, len(first))
    return rejected(slices, None, [Reject(None, reason) for _, reason in first])
