"""Documents that a teacher scores for each query, each once: the row's own, hard negatives, and the nearest ones.

Documents are known by the hash of their normalised text. Pure functions.

Legend: N rows of a unit of work, T distinct documents (hard negatives among them), D dimensions, S scored entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.normalise import text_hashes
from clusterbatch.embedding.vectors import vector_values
from clusterbatch.hashing import first_of_each
from clusterbatch.schema import scores_schema
from clusterbatch.search.neighbours import GroupKeys, neighbours

# Documents that a block of queries is scored against at once.
_DOCUMENTS = 8192


@dataclass(frozen=True)
class Candidates:
    """Entries of a unit's rows, sorted by row; the first N are the rows' own documents.

    queries, documents: distinct texts; query, own: (N,) positions of the rows' own; row, document: (S,) further
    entries; document_hash: (T,) uint64; negatives: hashes of each row's hard negatives, None if rows have none.
    """

    queries: list[str]
    documents: list[str]
    query: np.ndarray
    own: np.ndarray
    row: np.ndarray
    document: np.ndarray
    document_hash: np.ndarray
    negatives: pa.ListArray | None

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return queries and documents of the distinct (query, document) pairs, and the (N + S,) pair of each entry."""
        query = np.concatenate([self.query, self.query[self.row]]).astype(np.int64)
        keys = query * len(self.documents) + np.concatenate([self.own, self.document])
        distinct, pair_of_entry = np.unique(keys, return_inverse=True)
        return distinct // len(self.documents), distinct % len(self.documents), pair_of_entry

    def table(self, scores: np.ndarray) -> pa.Table:
        """Return the columns of `scores_schema`, (N,) rows; scores: (N + S,) of all entries."""
        rows, score = len(self.query), scores[len(self.query) :]
        hashes = self.document_hash[self.document]
        order = np.lexsort((hashes, -score, self.row))
        offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(self.row, minlength=rows))]).astype(np.int32))
        columns = [
            pa.array(scores[:rows], pa.float32()),
            pa.ListArray.from_arrays(offsets, pa.array(hashes[order], pa.uint64())),
            pa.ListArray.from_arrays(offsets, pa.array(score[order], pa.float32())),
        ]
        if self.negatives is not None:
            columns.append(self.negatives)
        return pa.table(columns, schema=scores_schema(self.negatives is not None))


def find_candidates(runs: pa.Table, text: pa.Table, windows: Sequence[int], nearest: int) -> Candidates:
    """Return the candidates of a unit's rows.

    runs: (N,) query_hash and document_hash, with query_vector and document_vector if `nearest` is above 0; text: query,
    document and, if rows have some, negatives of the same rows; windows: rows of each window, in order.
    """
    query_hash, document_hash = runs["query_hash"].to_numpy(), runs["document_hash"].to_numpy()
    rows = [np.empty(0, np.int64)]
    documents = [np.empty(0, np.int64)]
    if nearest:
        queries, vectors = vector_values(runs["query_vector"]), vector_values(runs["document_vector"])
        start = 0
        for count in windows:
            here = slice(start, start + count)
            row, document = nearest_documents(
                queries[here], vectors[here], query_hash[here], document_hash[here], nearest
            )
            rows.append(row + start)
            documents.append(document + start)
            start += count
    texts = text["document"].to_pylist()
    negatives = None
    hashes = document_hash
    if "negatives" in text.column_names:
        column = text["negatives"].combine_chunks()
        counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        given = column.flatten().to_pylist()
        of_negative = text_hashes(given, len(given))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        negatives = pa.ListArray.from_arrays(offsets, pa.array(of_negative, pa.uint64()))
        rows.append(np.repeat(np.arange(len(texts)), counts))
        documents.append(len(texts) + np.arange(len(given)))
        texts += given
        hashes = np.concatenate([hashes, of_negative])
    distinct, position = first_of_each(hashes)
    row, document = np.concatenate(rows), position[np.concatenate(documents)]
    # An entry once, however it was found, and never the row's own document.
    entry = np.unique(row * len(distinct) + document)
    row, document = entry // len(distinct), entry % len(distinct)
    own = position[: len(document_hash)]
    other = document != own[row]
    first, query = first_of_each(query_hash)
    return Candidates(
        queries=text["query"].take(pa.array(first)).to_pylist(),
        documents=[texts[place] for place in distinct.tolist()],
        query=query,
        own=own,
        row=row[other],
        document=document[other],
        document_hash=hashes[distinct],
        negatives=negatives,
    )


def nearest_documents(
    query: np.ndarray, document: np.ndarray, query_hash: np.ndarray, document_hash: np.ndarray, nearest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, document) of the nearest documents of each query in one window that are not known to answer it.

    query, document: (n, D) unit vectors of a window's rows; result: two (entries,) int64 of rows, fewer than `nearest`
    of a row if the window has no more.
    """

    def chunks() -> Iterator[np.ndarray]:
        return (document[start : start + _DOCUMENTS] for start in range(0, len(document), _DOCUMENTS))

    keys = GroupKeys(query_hash, document_hash)
    found = neighbours(query, query_hash, document, chunks(), keys, nearest).ranking.documents
    row, place = np.nonzero(found >= 0)
    return row, found[row, place]
