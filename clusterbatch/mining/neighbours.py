"""Exact search of a block of queries among the documents of their group, which stream by: one chunk is in memory.

Legend: Q queries of the block, N rows of the group, M rows of a chunk, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from clusterbatch.evaluation.search import Ranking, best_of, merge

# The own document's score comes from another product than the others': rounding must not give it a worse rank.
ROUNDING = 1e-5
_QUERY_BLOCK = 1024


class GroupKeys:
    """Which rows of a group are the same document, and which documents answer the same query; by 64-bit text hashes.

    first: (N,) bool, whether a row is the first with its document; document: (N,) int64, the row that is.
    """

    def __init__(self, query_hash: np.ndarray, document_hash: np.ndarray) -> None:
        _, first, group = np.unique(document_hash, return_index=True, return_inverse=True)
        self.document = first[group]
        self.first = self.document == np.arange(len(document_hash))
        self._order = np.argsort(query_hash, kind="stable")
        self._sorted = query_hash[self._order]

    def answers(self, query_hash: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of (Q,) queries: numbers of queries and the documents (rows) that answer them, two (pairs,) int64."""
        low = np.searchsorted(self._sorted, query_hash, side="left")
        high = np.searchsorted(self._sorted, query_hash, side="right")
        count = high - low
        query = np.repeat(np.arange(len(query_hash)), count)
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        return query, self.document[self._order[place]]


@dataclass(frozen=True)
class Neighbours:
    """ranking: the best documents that are not known to answer the query, by row of the group; positive: (Q,) float32,
    score of its own document; rank: (Q,) int64, how many documents score higher than that, answers included."""

    ranking: Ranking
    positive: np.ndarray
    rank: np.ndarray


def neighbours(
    query: np.ndarray,
    query_hash: np.ndarray,
    own: np.ndarray,
    chunks: Iterable[np.ndarray],
    keys: GroupKeys,
    k: int,
) -> Neighbours:
    """The k nearest documents of each query.

    query: (Q, D) unit vectors; query_hash: (Q,); own: (Q, D) vectors of their own documents; chunks: (M, D) document
    vectors of all rows of the group, in order.
    """
    queries = torch.from_numpy(np.ascontiguousarray(query, dtype=np.float32))
    positive = np.einsum("qd,qd->q", query.astype(np.float32), own.astype(np.float32))
    bound = torch.from_numpy(positive + ROUNDING)[:, None]
    rank = np.zeros(len(query), np.int64)
    asked, answer = keys.answers(query_hash)
    best: Ranking | None = None
    start = 0
    for chunk in chunks:
        documents = torch.from_numpy(np.ascontiguousarray(chunk, dtype=np.float32))
        repeated = torch.from_numpy(~keys.first[start : start + len(chunk)])
        inside = (answer >= start) & (answer < start + len(chunk))
        blocks = []
        for first in range(0, len(query), _QUERY_BLOCK):
            rows = slice(first, min(first + _QUERY_BLOCK, len(query)))
            scores_QM = queries[rows] @ documents.T
            scores_QM[:, repeated] = -torch.inf
            rank[rows] += (scores_QM > bound[rows]).sum(dim=1).numpy()
            here = inside & (asked >= rows.start) & (asked < rows.stop)
            scores_QM[torch.from_numpy(asked[here] - first), torch.from_numpy(answer[here] - start)] = -torch.inf
            found = best_of(scores_QM, k)
            blocks.append(Ranking(found.scores, np.where(found.documents < 0, -1, found.documents + start)))
        whole = Ranking(*(np.concatenate([getattr(b, name) for b in blocks]) for name in ("scores", "documents")))
        best = whole if best is None else merge([best, whole], k)
        start += len(chunk)
    assert best is not None, "a group without rows"
    return Neighbours(best, positive, rank)
