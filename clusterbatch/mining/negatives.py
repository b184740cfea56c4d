"""Mined negatives beside those that the corpus has."""

from __future__ import annotations

import pyarrow as pa


def with_negatives(rows: pa.Table, mined: pa.ChunkedArray) -> pa.Table:
    """`rows` with the lists of `mined` in column `negatives`, behind what stands there; lists and rows in one order."""
    if "negatives" not in rows.column_names:
        return rows.append_column("negatives", mined.cast(pa.list_(pa.string())))
    given = rows["negatives"].to_pylist()
    both = [(own or []) + (more or []) for own, more in zip(given, mined.to_pylist(), strict=True)]
    place = rows.schema.get_field_index("negatives")
    return rows.set_column(place, "negatives", pa.array(both, pa.list_(pa.string())))
