"""Validation during training: a search over a small test collection, shared by all ranks.

Belongs to the run, not to its result: it decides which checkpoint is kept as the best, never what is trained. It takes
the collection reader, the search and the measures of `evaluation`, whose stage measures models properly.
"""

from __future__ import annotations

import numpy as np
import torch

from clusterbatch.config import EvaluateConfig
from clusterbatch.encoder.model import Encoder
from clusterbatch.evaluation.collection import Collection, open_collections
from clusterbatch.evaluation.metrics import parse_metric, per_query
from clusterbatch.search.topk import descending_ids, identical_ids, search
from clusterbatch.store import Folder
from clusterbatch.training.collectives import World

METRIC = "NDCG@10"
_ANSWERS = 10


class Validation:
    """NDCG@10 on the collection in `folder`. Reads and tokenises this rank's share of it once.

    batch_tokens: tokens that go through the encoder at once.
    """

    def __init__(
        self, folder: Folder, config: EvaluateConfig, encoder: Encoder, world: World, batch_tokens: int
    ) -> None:
        self._world, self._batch_tokens = world, batch_tokens
        collection: Collection = open_collections([folder])[0]
        grades = collection.read_judgements()
        queries = collection.read_queries(grades)
        names, texts = collection.read_documents(0, collection.documents_bytes())
        # Numbered in descending order of ids, as search wants them.
        order = descending_ids(names)
        self._names = [names[number] for number in order]
        bounds = np.arange(world.size + 1) * len(order) // world.size
        self._documents_of_rank = np.diff(bounds).tolist()
        own = order[bounds[world.rank] : bounds[world.rank + 1]]
        self._queries = list(queries)[world.rank :: world.size]
        self._grades = {query: grades[query] for query in self._queries}
        self._judged = len(queries)
        self._excluded = identical_ids(self._queries, self._names, grades) if config.ignore_identical_ids else None
        self._query_tokens = encoder.prepare(
            [queries[query] for query in self._queries], config.max_query_tokens, encoder.prompts["query"]
        )
        self._document_tokens = encoder.prepare(
            [texts[number] for number in own], config.max_document_tokens, encoder.prompts["document"]
        )

    def measure(self, encoder: Encoder) -> float:
        """Return the mean over all judged queries, the same on every rank. All ranks must call it."""
        documents = torch.from_numpy(encoder.encode(self._document_tokens, self._batch_tokens)).to(encoder.device)
        every = self._world.gather(documents, self._documents_of_rank)
        total = torch.zeros(1, dtype=torch.float64, device=encoder.device)
        if self._queries:
            queries = torch.from_numpy(encoder.encode(self._query_tokens, self._batch_tokens)).to(encoder.device)
            ranking = search(queries, every, _ANSWERS, self._excluded)
            answers = {
                query: [self._names[number] for number in row if number >= 0]
                for query, row in zip(self._queries, ranking.documents.tolist(), strict=True)
            }
            metric = parse_metric(METRIC)
            total += float(per_query([metric], self._grades, answers)[metric.name].sum())
        return float(self._world.sum_(total)) / self._judged
