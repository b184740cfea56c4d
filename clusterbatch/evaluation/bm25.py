"""BM25 as a reference column: what plain word matching finds, by bm25s (Lucene's variant of the formula).

Words are runs of letters, digits and the marks on them, case folded. Japanese and Chinese are written without spaces:
their runs are cut into overlapping pairs of characters, which needs no dictionary and is what search engines do by
default.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Sequence

import numpy as np
import torch

from clusterbatch.search.topk import Ranking, best_of

# Anserini's values for BEIR.
_K1, _B = 0.9, 0.4
_CJK = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\uac00-\ud7af々〆"
# Vowel signs and other combining marks, which Python's \w leaves out: without them words of Indic scripts fall apart.
_MARKS = "".join(chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) in ("Mn", "Mc"))
_RUNS = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}](?:[^\W_{_CJK}]|[{_MARKS}])*")
_FIRST_CJK = re.compile(rf"[{_CJK}]")
_QUERY_BLOCK = 256


def words(text: str) -> list[str]:
    """Terms of a text: words, and character pairs of scripts that do not separate words."""
    terms: list[str] = []
    for run in _RUNS.findall(unicodedata.normalize("NFKC", text).casefold()):
        if len(run) > 1 and _FIRST_CJK.match(run):
            terms += [run[start : start + 2] for start in range(len(run) - 1)]
        else:
            terms.append(run)
    return terms


class LexicalIndex:
    """N documents, in descending order of their ids (see search.py), in memory."""

    def __init__(self, documents: Sequence[str]) -> None:
        # If jax is installed, bm25s starts it, and jax would take three quarters of a GPU for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import bm25s

        self._index = bm25s.BM25(method="lucene", k1=_K1, b=_B)
        terms = [words(document) for document in documents]
        # bm25s cannot index documents that all have no term, as symbols have none.
        self._known: Collection[str] = ()
        if any(terms):
            self._index.index(terms, show_progress=False)
            self._known = self._index.vocab_dict.keys()
        self._documents = len(documents)

    def search(self, queries: Sequence[str], k: int, excluded: np.ndarray | None = None) -> Ranking:
        """(queries, k): the best documents of every query; documents that share no term with it are not answers.

        excluded: (queries,) int64, the document that is not an answer to each, or -1.
        """
        rankings = []
        for start in range(0, len(queries), _QUERY_BLOCK):
            block = [words(query) for query in queries[start : start + _QUERY_BLOCK]]
            scores = np.stack([self._scores(terms) for terms in block])
            rows = None if excluded is None else excluded[start : start + _QUERY_BLOCK]
            rankings.append(best_of(torch.from_numpy(scores), k, rows))
        return Ranking(
            np.concatenate([ranking.scores for ranking in rankings]),
            np.concatenate([ranking.documents for ranking in rankings]),
        )

    def _scores(self, terms: list[str]) -> np.ndarray:
        """(N,) float32, -inf where no term is shared."""
        known = [term for term in terms if term in self._known]
        if not known:
            return np.full(self._documents, -np.inf, np.float32)
        scores = self._index.get_scores(known).astype(np.float32)
        return np.where(scores > 0, scores, -np.inf).astype(np.float32)
