"""Mined negatives beside those that the corpus has, with their margins where those were kept."""

from __future__ import annotations

import math

import pyarrow as pa

MARGINS = "negative_margins"


def with_negatives(rows: pa.Table, mined: pa.ChunkedArray) -> pa.Table:
    """`rows` with the lists of `mined` in column `negatives`, behind what stands there; lists and rows in one order."""
    if "negatives" not in rows.column_names:
        return rows.append_column("negatives", mined.cast(pa.list_(pa.string())))
    given = rows["negatives"].to_pylist()
    both = [(own or []) + (more or []) for own, more in zip(given, mined.to_pylist(), strict=True)]
    place = rows.schema.get_field_index("negatives")
    return rows.set_column(place, "negatives", pa.array(both, pa.list_(pa.string())))


def with_margins(rows: pa.Table, mined: pa.ChunkedArray) -> pa.Table:
    """`rows`, before they got their mined negatives, with a column of margins for all that they will have then; NaN for
    those of the corpus, which nobody scored."""
    margins = mined.cast(pa.list_(pa.float32()))
    if "negatives" in rows.column_names:
        given = rows["negatives"].to_pylist()
        both = [[math.nan] * len(own or []) + more for own, more in zip(given, mined.to_pylist(), strict=True)]
        margins = pa.array(both, pa.list_(pa.float32()))
    return rows.append_column(MARGINS, margins)
