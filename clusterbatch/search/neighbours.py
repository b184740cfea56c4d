"""Search of a block of queries among the documents of their group, exact or approximate.

Exact: the documents stream by, one chunk is in memory. Approximate, for large groups: faiss' inverted file, which
scores a query only against the documents near it.

Legend: Q queries of the block, N rows of the group, M rows of a chunk, D dimensions, K results that are asked of faiss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clusterbatch.config import MineConfig
from clusterbatch.search.topk import Ranking, best_of, merge

# The own document's score comes from another product than the others': rounding must not give it a worse rank.
ROUNDING = 1e-5
_QUERY_BLOCK = 1024


class GroupKeys:
    """Rows of a group with the same document, and documents that answer the same query, by 64-bit text hashes.

    first: (N,) bool, whether a row is the first with its document; document: (N,) int64, the row that is; whole: (N,)
    hashes of what each row's document is a part of, None if the corpus does not say.
    """

    def __init__(self, query_hash: np.ndarray, document_hash: np.ndarray, whole: np.ndarray | None = None) -> None:
        self.whole = whole
        self._documents, first, group = np.unique(document_hash, return_index=True, return_inverse=True)
        self._first_rows = first
        self.document = first[group]
        self.first = self.document == np.arange(len(document_hash))
        self._of_query = _RowsOf(query_hash, np.arange(len(query_hash)))
        # Rows whose text came first as a part of something else: only that first row is ranked.
        elsewhere = np.flatnonzero(whole != whole[self.document]) if whole is not None else np.empty(0, np.int64)
        self._of_whole = _RowsOf(whole[elsewhere], elsewhere) if whole is not None else None

    def rows_of(self, document_hash: np.ndarray) -> np.ndarray:
        """Return the first row with each of (n,) documents, (n,) int64; -1 where no row has it."""
        place = np.minimum(np.searchsorted(self._documents, document_hash), len(self._documents) - 1)
        return np.where(self._documents[place] == document_hash, self._first_rows[place], -1)

    def answers(self, query_hash: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers of the (Q,) queries and of the documents (rows) that answer them, two (pairs,) int64."""
        query, row = self._of_query.find(query_hash)
        return query, self.document[row]

    def parts_elsewhere(self, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers of (Q,) whole documents and of those of their parts (rows) that are ranked as another's."""
        if self._of_whole is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        number, row = self._of_whole.find(whole)
        return number, self.document[row]


class _RowsOf:
    """Rows by a key that several of them may have. keys, rows: (n,)."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return positions among (Q,) `keys`, ascending, and the rows with that key, two (found,) int64."""
        low = np.searchsorted(self._keys, keys, side="left")
        count = np.searchsorted(self._keys, keys, side="right") - low
        position = np.repeat(np.arange(len(keys)), count)
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        return position, self._rows[place]


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
    whole: np.ndarray | None = None,
    given: tuple[np.ndarray, np.ndarray] | None = None,
) -> Neighbours:
    """The k nearest documents of each query.

    query: (Q, D) unit vectors; query_hash: (Q,); own: (Q, D) vectors of their own documents; chunks: (M, D) document
    vectors of all rows of the group, in order; whole: (Q,) what their own documents are parts of, comparable with that
    of `keys`: other parts of it are not ranked. given: numbers of queries and of documents (rows) that they have as
    negatives already, two (pairs,) int64, which are not ranked either.
    """
    queries = torch.from_numpy(np.ascontiguousarray(query, dtype=np.float32))
    positive = np.einsum("qd,qd->q", query.astype(np.float32), own.astype(np.float32))
    bound = torch.from_numpy(positive + ROUNDING)[:, None]
    rank = np.zeros(len(query), np.int64)
    asked, answer = _left_out(keys, query_hash, whole, given)
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
            if whole is not None and keys.whole is not None:
                parts = whole[rows, None] == keys.whole[None, start : start + len(chunk)]
                scores_QM[torch.from_numpy(parts)] = -torch.inf
            found = best_of(scores_QM, k)
            blocks.append(Ranking(found.scores, np.where(found.documents < 0, -1, found.documents + start)))
        found = Ranking(*(np.concatenate([getattr(b, name) for b in blocks]) for name in ("scores", "documents")))
        best = found if best is None else merge([best, found], k)
        start += len(chunk)
    assert best is not None, "a group without rows"
    return Neighbours(best, positive, rank)


def _left_out(
    keys: GroupKeys,
    query_hash: np.ndarray,
    whole: np.ndarray | None,
    given: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of queries and of documents that are not ranked for them: answers, given negatives, and parts of
    their document that are ranked as parts of another."""
    pairs = [keys.answers(query_hash)]
    if whole is not None:
        pairs.append(keys.parts_elsewhere(whole))
    if given is not None:
        pairs.append(given)
    asked, document = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return asked, document


# Lists are 2 sqrt(N), so that choosing among them costs about as much as scoring the rows of some.
_LISTS_PER_ROOT = 2
# Rows of the sample that lists are fitted to, for each: faiss asks for 39 at least, and small groups have fewer lists.
_SAMPLE_PER_LIST = 64
_LEAST_PER_LIST = 39
# Answers of one query for which there is room beside the k documents that are not.
_MOST_ANSWERS = 256


@dataclass(frozen=True)
class Approximation:
    """above: rows of a group from which on its search is approximate; probes: lists that a query is scored against."""

    above: int
    probes: int

    @staticmethod
    def of(config: MineConfig) -> Approximation | None:
        """Return the approximation that the configuration asks for; None if every search is exact."""
        if config.approximate_above is None:
            return None
        return Approximation(config.approximate_above, config.probes)


class ApproximateIndex:
    """The documents of a group, each once, as float16 in memory: N (2 D + 8) bytes.

    chunks: makes the (M, D) document vectors of all rows of the group, in order; they are read twice. The same chunks
    give the same index: faiss' k-means has a fixed seed, its sample is evenly spaced rows.
    """

    def __init__(self, chunks: Callable[[], Iterable[np.ndarray]], keys: GroupKeys, probes: int) -> None:
        # Imported here, as it brings a thread runtime of its own.
        import faiss

        faiss.omp_set_num_threads(1)
        self._keys = keys
        rows = len(keys.document)
        lists = max(1, min(round(_LISTS_PER_ROOT * rows**0.5), rows // _LEAST_PER_LIST))
        step = max(1, rows // (_SAMPLE_PER_LIST * lists))
        sample, start = [], 0
        for chunk in chunks():
            sample.append(np.asarray(chunk[-start % step :: step], np.float32))
            start += len(chunk)
        training = np.concatenate(sample)
        dimensions = training.shape[1]
        # Rows as they are, not as differences to their list's centroid: they came as float16, so nothing is lost.
        self._lists = faiss.IndexFlatIP(dimensions)
        kind = faiss.ScalarQuantizer.QT_fp16
        metric = faiss.METRIC_INNER_PRODUCT
        self._index: Any = faiss.IndexIVFScalarQuantizer(self._lists, dimensions, lists, kind, metric, False)
        self._index.train(training)
        start = 0
        for chunk in chunks():
            first = np.flatnonzero(keys.first[start : start + len(chunk)])
            self._index.add_with_ids(np.asarray(chunk[first], np.float32), first + start)
            start += len(chunk)
        self.probes = probes

    @property
    def probes(self) -> int:
        """Lists that a query is scored against."""
        return int(self._index.nprobe)

    @probes.setter
    def probes(self, count: int) -> None:
        self._index.nprobe = min(count, int(self._index.nlist))

    def search(
        self,
        query: np.ndarray,
        query_hash: np.ndarray,
        own: np.ndarray,
        k: int,
        ranks: int = 0,
        whole: np.ndarray | None = None,
        given: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Neighbours:
        """Search as `neighbours` does, among the rows that faiss finds.

        Ranks are counted up to `ranks` or k, whichever is more.

        If a query has more than 256 answers, parts of its document and given negatives counted, fewer than k documents
        may be left.
        """
        query = np.ascontiguousarray(query, np.float32)
        positive = np.einsum("qd,qd->q", query, own.astype(np.float32))
        asked, answer = _left_out(self._keys, query_hash, whole, given)
        most = int(np.bincount(asked, minlength=1).max())
        if whole is not None and self._keys.whole is not None:
            most += int(np.unique(self._keys.whole, return_counts=True)[1].max())
        wanted = min(max(k, ranks) + min(most, _MOST_ANSWERS), int(self._index.ntotal))
        scores, documents = self._index.search(query, wanted)
        rank = ((scores > positive[:, None] + ROUNDING) & (documents >= 0)).sum(axis=1).astype(np.int64)
        scores[documents < 0] = -np.inf
        # (query, document) as one number: which of the results are answers.
        rows = len(self._keys.document)
        pairs = np.arange(len(query))[:, None] * rows + documents
        scores[np.isin(pairs, asked * rows + answer) & (documents >= 0)] = -np.inf
        if whole is not None and self._keys.whole is not None:
            scores[self._keys.whole[documents] == whole[:, None]] = -np.inf
        documents[np.isneginf(scores)] = -1
        return Neighbours(merge([Ranking(scores, documents)], k), positive, rank)
