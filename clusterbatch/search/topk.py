"""Exact nearest documents by inner product: blocked matrix products and a merge of the best of each block.

Order, everywhere: higher score first; of equal scores the document with the larger id first, ids compared as UTF-8
bytes. It is trec_eval's order, so a run file means the same to every tool that reads it. Documents are numbered in
descending order of their ids, after which the rule is simply "of equal scores the smaller number first".

BEIR's rule for identical ids: a document with the same id as the query is not an answer to it (if queries are
documents, it would be the query itself). It is left out before the best are taken, so that it costs no place.

Q queries, N documents, D dimensions, K best kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clusterbatch.errors import DataError

# Scores alive at once: 1,024 x 8,192 float32 are 32 MiB.
_QUERY_BLOCK = 1024
_DOCUMENT_BLOCK = 8192


@dataclass(frozen=True)
class Ranking:
    """The best documents of Q queries, best first.

    scores: (Q, K) float32; documents: (Q, K) int64 numbers. If a query has fewer than K candidates, its row ends
    with score -inf and number -1.
    """

    scores: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def descending_ids(ids: Sequence[str]) -> np.ndarray:
    """(N,) int64: the order that numbers documents by descending id, as UTF-8 bytes."""
    encoded = [identifier.encode() for identifier in ids]
    return np.array(sorted(range(len(ids)), key=encoded.__getitem__, reverse=True), dtype=np.int64)


def identical_ids(
    queries: Sequence[str], documents: Sequence[str], judgements: Mapping[str, Mapping[str, int]] | None = None
) -> np.ndarray | None:
    """Return (Q,) int64 numbers of the documents with the query's own id, -1 for none; None if no query has one.

    judgements: grade by document by query. A document that is judged to answer the query of its id is an answer: if ids
    are row numbers of two files, an equal id means nothing.
    """
    judged = judgements or {}
    numbers = {identifier: number for number, identifier in enumerate(documents)}
    excluded = np.array(
        [-1 if judged.get(query, {}).get(query, 0) > 0 else numbers.get(query, -1) for query in queries], np.int64
    )
    return excluded if (excluded >= 0).any() else None


def search(queries: torch.Tensor, documents: torch.Tensor, k: int, excluded: np.ndarray | None = None) -> Ranking:
    """The k best documents of every query.

    queries: (Q, D) and documents: (N, D), float32 on one device, documents in descending order of their ids.
    excluded: (Q,) int64, the one document that is not an answer to the query, -1 for none.

    Raises DataError if a vector is not finite.
    """
    check_finite(queries, "query")
    check_finite(documents, "document")
    size, width = len(queries), min(k, len(documents))
    scores = np.full((size, k), -np.inf, np.float32)
    numbers = np.full((size, k), -1, np.int64)
    for start in range(0, size, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, size))
        best: Ranking | None = None
        for first in range(0, len(documents), _DOCUMENT_BLOCK):
            scores_QN = queries[rows] @ documents[first : first + _DOCUMENT_BLOCK].T
            if excluded is not None:
                _leave_out(scores_QN, excluded[rows] - first)
            values, positions = _top(scores_QN, min(width, scores_QN.shape[1]))
            block = Ranking(values, positions + first)
            best = block if best is None else _merge_sorted([best, block], width)
        if best is not None:
            scores[rows, : best.scores.shape[1]] = best.scores
            numbers[rows, : best.scores.shape[1]] = np.where(np.isneginf(best.scores), -1, best.documents)
    return Ranking(scores, numbers)


def check_finite(vectors: torch.Tensor, side: str) -> None:
    """Raise DataError if some of the (N, D) vectors are not finite: their scores would rank documents by their ids."""
    broken = int((~vectors.isfinite()).any(dim=1).sum())
    if broken:
        raise DataError(
            f"{broken:,} of {len(vectors):,} {side} vectors are not finite; the model's weights or the number type are "
            "not fit for these texts"
        )


def best_of(scores_QN: torch.Tensor, k: int, excluded: np.ndarray | None = None) -> Ranking:
    """(Q, k): the best of scores (Q, N), -inf for no answer; excluded documents become that in `scores_QN`."""
    if excluded is not None:
        _leave_out(scores_QN, excluded)
    values, numbers = _top(scores_QN, min(k, scores_QN.shape[1]))
    return merge([Ranking(values, np.where(np.isneginf(values), -1, numbers))], k)


def merge(rankings: Sequence[Ranking], k: int) -> Ranking:
    """The k best of several rankings of the same queries over disjoint documents, numbered alike."""
    merged = _merge_sorted(rankings, k)
    short = k - merged.scores.shape[1]
    if short > 0:
        pad = ((0, 0), (0, short))
        return Ranking(
            np.pad(merged.scores, pad, constant_values=-np.inf), np.pad(merged.documents, pad, constant_values=-1)
        )
    return merged


def _merge_sorted(rankings: Sequence[Ranking], k: int) -> Ranking:
    scores = np.concatenate([ranking.scores for ranking in rankings], axis=1)
    documents = np.concatenate([ranking.documents for ranking in rankings], axis=1)
    # Two keys, the last is the first to decide: score descending, then number ascending.
    order = np.lexsort((documents, -scores), axis=1)[:, :k]
    return Ranking(np.take_along_axis(scores, order, 1), np.take_along_axis(documents, order, 1))


def _top(scores_QN: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positions (Q, k) of the best of each row; of equal scores the smaller position first."""
    values, positions = scores_QN.topk(k, dim=1)
    # topk takes any of the equal scores at its edge; rows where that matters are sorted in full.
    edge = values[:, -1:]
    undecided = ((scores_QN >= edge).sum(1) > k).nonzero()[:, 0]
    if len(undecided):
        full = scores_QN[undecided].sort(dim=1, descending=True, stable=True)
        values[undecided], positions[undecided] = full.values[:, :k], full.indices[:, :k]
    found, places = values.cpu().numpy(), positions.cpu().numpy()
    order = np.lexsort((places, -found), axis=1)
    return np.take_along_axis(found, order, 1), np.take_along_axis(places, order, 1)


def _leave_out(scores_QN: torch.Tensor, positions: np.ndarray) -> None:
    rows = np.flatnonzero((positions >= 0) & (positions < scores_QN.shape[1]))
    if len(rows):
        scores_QN[torch.from_numpy(rows), torch.from_numpy(positions[rows])] = -torch.inf
