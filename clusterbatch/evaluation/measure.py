"""One encoder on one collection in one process, for comparisons, which measure again and again while they train.

The stage spreads documents over workers; here the caller spreads models, so texts are tokenised once and kept. Memory
is the tokens of the collection and one block of document vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from clusterbatch.encoder.images import Pixels
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError
from clusterbatch.evaluation.collection import Collection, Texts
from clusterbatch.evaluation.metrics import Metric, per_query
from clusterbatch.search.topk import Ranking, descending_ids, identical_ids, merge, search

_DOCUMENTS_AT_ONCE = 16_384
_READ_BYTES = 16 * 2**20


class LoadedCollection:
    """A collection in memory, its documents in descending order of their ids.

    `queries` are the judged ones in the order of the judgements, which is that of every score returned.
    """

    def __init__(
        self, collection: Collection, max_query_tokens: int, max_document_tokens: int, ignore_identical_ids: bool = True
    ) -> None:
        """Read the collection. Raises DataError if it is damaged."""
        self.collection = collection
        self.judgements: Mapping[str, Mapping[str, int]] = collection.read_judgements()
        texts = collection.read_queries(dict(self.judgements))
        self.queries = list(texts)
        ids: list[str] = []
        documents: list[str] = []
        for start, end in collection.document_ranges(_READ_BYTES):
            names, read = collection.read_documents(start, end)
            ids += names
            documents += read
        if len(set(ids)) < len(ids):
            raise DataError(f"collection {collection.name}: a document id occurs twice in its corpus.jsonl")
        order = descending_ids(ids)
        self.document_ids = [ids[row] for row in order]
        self.query_texts = Texts("query", list(texts.values()), max_query_tokens)
        self.document_texts = Texts("document", [documents[row] for row in order], max_document_tokens)
        self._excluded = (
            identical_ids(self.queries, self.document_ids, self.judgements) if ignore_identical_ids else None
        )

    def search(self, encoder: Encoder, k: int, batch_tokens: int) -> Ranking:
        """Return the k best documents of every query; numbers index `document_ids`."""
        queries = self.query_texts.vectors(encoder, batch_tokens)
        tokens = self.document_texts.tokens(encoder)
        best: Ranking | None = None
        for first in range(0, len(tokens), _DOCUMENTS_AT_ONCE):
            block = tokens.slice(first, min(first + _DOCUMENTS_AT_ONCE, len(tokens)))
            excluded = None if self._excluded is None else self._excluded - first
            found = search(queries, _encoded(encoder, block, batch_tokens), k, excluded)
            found = Ranking(found.scores, np.where(found.documents < 0, -1, found.documents + first))
            best = found if best is None else merge([best, found], k)
        assert best is not None
        return best

    def measure(
        self, encoder: Encoder, metrics: Sequence[Metric], top_k: int, batch_tokens: int
    ) -> dict[str, np.ndarray]:
        """Return (Q,) float64 by metric name."""
        ranking = self.search(encoder, top_k, batch_tokens)
        answers = {
            query: [self.document_ids[number] for number in numbers if number >= 0]
            for query, numbers in zip(self.queries, ranking.documents.tolist(), strict=True)
        }
        return per_query(metrics, self.judgements, answers)


def _encoded(encoder: Encoder, tokens: Tokens | Pixels, batch_tokens: int) -> torch.Tensor:
    return torch.from_numpy(encoder.encode(tokens, batch_tokens)).to(encoder.device)
