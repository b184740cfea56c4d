"""What a bucket knows of its clusters, kept for the statistics over all of them: one small row per cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_sides, feature_vectors
from clusterbatch.clustering.terms import count_terms
from clusterbatch.clustering.vectors import vector_column
from clusterbatch.corpus.data_uri import is_data_uri, readable

# Examples of each kind, and characters of a text that are kept.
EXAMPLES = 3
_CHARACTERS = 200
# Rows whose words are counted, and how much of each.
_TERM_ROWS = 64
_TERM_CHARACTERS = 400

EXAMPLE = pa.struct(
    [
        pa.field("pair_id", pa.string()),
        pa.field("query", pa.string()),
        pa.field("document", pa.string()),
        pa.field("cosine", pa.float32()),
    ]
)


def cluster_facts(table: pa.Table, pieces: Sequence[dict[str, Any]], features: Features) -> pa.Table:
    """One row for each piece, in order; `table` has the rows of all pieces, one after the other.

    Columns: rows, cosine (sum), duplicates (rows whose document an earlier row has), characters (of documents), vector
    (sum of the features, if there are any), near and far (list of EXAMPLE), terms and counts (lists).
    """
    starts = np.concatenate([[0], np.cumsum([piece["rows"] for piece in pieces])]).tolist()
    slices = [table.slice(start, piece["rows"]) for start, piece in zip(starts, pieces, strict=False)]
    cosines = [rows["cosine"].to_numpy() for rows in slices]
    far_first = [np.argsort(cosine, kind="stable") for cosine in cosines]
    texts = [
        [
            text[:_TERM_CHARACTERS]
            for side in ("query", "document")
            for text in rows[side][:_TERM_ROWS].to_pylist()
            if not is_data_uri(text)
        ]
        for rows in slices
    ]
    terms, counts = count_terms(texts)
    columns: dict[str, Any] = {
        "rows": [rows.num_rows for rows in slices],
        "cosine": [float(cosine.sum(dtype=np.float64)) for cosine in cosines],
        "duplicates": [rows.num_rows - len(np.unique(rows["document_hash"].to_numpy())) for rows in slices],
        "characters": [sum(map(len, rows["document"].to_pylist())) for rows in slices],
        "near": pa.array(
            [_examples(r, far[::-1]) for r, far in zip(slices, far_first, strict=True)], pa.list_(EXAMPLE)
        ),
        "far": pa.array([_examples(r, far) for r, far in zip(slices, far_first, strict=True)], pa.list_(EXAMPLE)),
        "terms": pa.array(terms, pa.list_(pa.string())),
        "counts": pa.array(counts, pa.list_(pa.int64())),
    }
    if all(f"{side}_vector" in table.column_names for side in feature_sides(features)):
        sums = [feature_vectors(rows, features).sum(axis=0, dtype=np.float64) for rows in slices]
        columns["vector"] = vector_column(np.array(sums, np.float32))
    return pa.table(columns)


def _examples(rows: pa.Table, order: np.ndarray) -> list[dict[str, Any]]:
    chosen = rows.select(["pair_id", "query", "document", "cosine"]).take(pa.array(order[:EXAMPLES])).to_pylist()
    return [
        {**row, "query": readable(row["query"], _CHARACTERS), "document": readable(row["document"], _CHARACTERS)}
        for row in chosen
    ]
