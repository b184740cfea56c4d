"""Facts about the clusters of a bucket, kept for the statistics over all clusters: one small row per cluster.

Terms that name a cluster: class-based TF-IDF over clusters. Grootendorst 2022, "BERTopic" (arXiv 2203.05794):
tf(t, c) * log(1 + A / f(t)), where a class is a cluster, A the mean number of words of a class, and f(t) how often a
term occurs in all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import Features, feature_sides, feature_vectors
from clusterbatch.corpus.images import is_data_uri, readable
from clusterbatch.embedding.vectors import vector_column

# Terms of a cluster whose counts are kept.
_KEPT = 60
# Han, kana, Thai, Lao, Khmer, Myanmar: scripts that put no spaces between words.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_UNSPACED_SHARE = 0.2
# Examples of each kind, and characters of a text that are kept.
EXAMPLES = 3
CHARACTERS = 200
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
    """Return one row for each piece, in order; `table` has the rows of all pieces, one after the other.

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
        {**row, "query": readable(row["query"], CHARACTERS), "document": readable(row["document"], CHARACTERS)}
        for row in chosen
    ]


def count_terms(texts_of_cluster: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[list[int]]]:
    """Return the most frequent terms of each cluster and how often they occur.

    Terms are words without English stop words; in scripts without spaces, runs of two to four characters.
    """
    documents = ["\n".join(texts) for texts in texts_of_cluster]
    unspaced = np.array([_is_unspaced(document) for document in documents], bool)
    # Imported here, as only workers that write shards count terms; the others need not wait for it.
    from sklearn.feature_extraction.text import CountVectorizer

    terms: list[list[str]] = [[] for _ in documents]
    counts: list[list[int]] = [[] for _ in documents]
    for kind, vectorizer in (
        (False, CountVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]\w+\b")),
        (True, CountVectorizer(analyzer=_character_runs)),
    ):
        chosen = np.flatnonzero(unspaced == kind)
        if not len(chosen):
            continue
        try:
            matrix = vectorizer.fit_transform([documents[number] for number in chosen]).tocsr()
        except ValueError:
            # Nothing but stop words and numbers.
            continue
        names = vectorizer.get_feature_names_out()
        for row, number in enumerate(chosen):
            found = matrix[row]
            order = np.lexsort((found.indices, -found.data))[:_KEPT]
            terms[number] = names[found.indices[order]].tolist()
            counts[number] = found.data[order].tolist()
    return terms, counts


def naming_terms(terms: Sequence[Sequence[str]], counts: Sequence[Sequence[int]], number: int = 8) -> list[list[str]]:
    """Return the `number` terms of highest class-based TF-IDF of each cluster, from the counts of all clusters."""
    frequency: Counter[str] = Counter()
    for names, values in zip(terms, counts, strict=True):
        for name, value in zip(names, values, strict=True):
            frequency[name] += value
    mean_words = sum(frequency.values()) / max(1, len(terms))
    named = []
    for names, values in zip(terms, counts, strict=True):
        total = max(1, sum(values))
        weight = {
            name: value / total * np.log(1 + mean_words / frequency[name])
            for name, value in zip(names, values, strict=True)
        }
        named.append(sorted(weight, key=lambda name: (-weight[name], name))[:number])
    return named


def _is_unspaced(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    return letters > 0 and len(_UNSPACED.findall(text)) > _UNSPACED_SHARE * letters


def _character_runs(text: str) -> list[str]:
    words = re.findall(r"\w+", text)
    return [word[i : i + n] for word in words for n in (2, 3, 4) for i in range(len(word) - n + 1)]
