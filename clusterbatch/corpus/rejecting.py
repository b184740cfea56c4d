"""Rejected rows between the passes of ingest: by slice, since positions in files are known only when all is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.rows import Reject
from clusterbatch.store.artifact import Receipt

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
