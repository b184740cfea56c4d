"""Rejected rows between the passes of ingest: by slice, since positions in files are known only when all is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.rows import Reject

REJECTED = pa.schema(
    [
        pa.field("slice", pa.int64()),
        # Zero-based position in the slice; null where the rest of the file is meant.
        pa.field("position", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("content", pa.string()),
    ]
)


def rejected(slices: np.ndarray, positions: np.ndarray | None, rejects: Sequence[Reject]) -> pa.Table:
    """A table of `REJECTED`; `slices` and `positions` are (n,) int64, no positions where files are meant."""
    columns = {
        "slice": pa.array(slices, pa.int64()),
        "position": pa.nulls(len(rejects), pa.int64()) if positions is None else pa.array(positions, pa.int64()),
        "reason": [reject.reason for reject in rejects],
        "content": [reject.content for reject in rejects],
    }
    return pa.table(columns, schema=REJECTED)
