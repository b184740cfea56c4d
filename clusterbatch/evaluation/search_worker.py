"""One work item of an evaluation: embed a range of a collection's documents and keep each query's best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.encoder.model import Encoder
from clusterbatch.evaluation.bm25 import LexicalIndex
from clusterbatch.evaluation.collection import Collection, Texts
from clusterbatch.evaluation.models import EvaluatedModel, load
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search.topk import Ranking, descending_ids, identical_ids, search
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.tables import read_parquet, write_parquet

# Folder inside the artifact for what is merged and then removed.
CANDIDATES = "candidates"
# Weights that a worker keeps between units; beyond that it loads them again, which costs less than memory.
_KEPT_BYTES = 2 * 2**30
_SCHEMA = pa.schema(
    [
        pa.field("score", pa.float32(), nullable=False),
        # Null where the range has fewer documents than are kept.
        pa.field("document", pa.dictionary(pa.int32(), pa.string())),
    ]
)


@dataclass(frozen=True)
class ShardTask:
    """Documents of `collection` in bytes [start, end) of its file, by all `models`; queries are cut into blocks.

    A lexical task is the whole collection at once: BM25 weighs words by all documents.
    """

    models: tuple[EvaluatedModel, ...]
    collection: Collection
    start: int
    end: int
    query_block: int
    lexical: bool = False


class SearchWorker:
    """Takes one range of documents through all models, so that those with one tokenizer share the tokens.

    Keeps encoders as long as they are small, and the queries of the collection it met last.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._encoders: dict[EvaluatedModel, Encoder] = {}
        self._queries: _Queries | None = None

    def process(self, item: WorkItem, output: Artifact) -> Result:
        task: ShardTask = item.payload
        if self._queries is None or self._queries.collection != task.collection:
            self._queries = _Queries(task.collection, self._config)
        queries = self._queries
        ids, texts = task.collection.read_documents(task.start, task.end)
        order = descending_ids(ids)
        ids = [ids[row] for row in order]
        documents = Texts("document", [texts[row] for row in order], self._config.evaluate.max_document_tokens)
        excluded = queries.excluded(ids) if self._config.evaluate.ignore_identical_ids else None
        parts = []
        for model in task.models:
            if task.lexical:
                ranking = LexicalIndex(documents.texts).search(queries.texts, self._config.evaluate.top_k, excluded)
            else:
                encoder = self._encoder(model)
                vectors = documents.vectors(encoder, self._config.embed.batch_tokens)
                ranking = search(queries.vectors(model, encoder), vectors, self._config.evaluate.top_k, excluded)
            parts += _write(output, item.number, task, model, ranking, ids)
        return Result(
            parts,
            # The reference reads what other items count already.
            Counts() if task.lexical else Counts(read=len(ids), written=len(ids)),
            {"judged": len(queries.judged.intersection(ids))},
        )

    def _encoder(self, model: EvaluatedModel) -> Encoder:
        if model not in self._encoders:
            held = sum(_weight_bytes(encoder) for encoder in self._encoders.values())
            if held > _KEPT_BYTES:
                self._encoders.clear()
            self._encoders[model] = load(model, self._config)
        return self._encoders[model]


class _Queries:
    """The judged queries of a collection: ids, vectors by model, and the ids of all judged documents."""

    def __init__(self, collection: Collection, config: RunConfig) -> None:
        judgements = collection.read_judgements()
        texts = collection.read_queries(judgements)
        self.collection = collection
        self.judged = {document for grades in judgements.values() for document in grades}
        self._ids = list(texts)
        self.texts = list(texts.values())
        self._texts = Texts("query", self.texts, config.evaluate.max_query_tokens)
        self._batch_tokens = config.embed.batch_tokens
        self._vectors: dict[EvaluatedModel, torch.Tensor] = {}

    def vectors(self, model: EvaluatedModel, encoder: Encoder) -> torch.Tensor:
        """(Q, D) float32."""
        if model not in self._vectors:
            self._vectors[model] = self._texts.vectors(encoder, self._batch_tokens)
        return self._vectors[model]

    def excluded(self, documents: Sequence[str]) -> np.ndarray | None:
        """(Q,) int64: the number of the document that has the query's own id, -1 where there is none."""
        return identical_ids(self._ids, documents)


def read_candidates(artifact: Artifact, part: Part) -> tuple[Ranking, list[str]]:
    """One block of queries over one range of documents: the ranking, and the ids that its numbers mean."""
    table = read_parquet(artifact.folder, part)
    k = part.details["top_k"]
    documents = table["document"].combine_chunks()
    numbers = documents.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    scores = table["score"].to_numpy()
    return Ranking(scores.reshape(-1, k), numbers.reshape(-1, k)), documents.dictionary.to_pylist()


def _write(
    output: Artifact, number: int, task: ShardTask, model: EvaluatedModel, ranking: Ranking, ids: Sequence[str]
) -> list[Part]:
    """Write an item's ranking by one model, one part for each block of queries."""
    parts = []
    for block, first in enumerate(range(0, len(ranking), task.query_block)):
        rows = slice(first, first + task.query_block)
        table = _candidates(Ranking(ranking.scores[rows], ranking.documents[rows]), ids)
        stem = f"{CANDIDATES}/unit-{number:08d}-{task.models.index(model):02d}-{block:04d}"
        details = {"model": model.label, "block": block, "top_k": ranking.scores.shape[1]}
        parts.append(write_parquet(output, stem, table, **details))
    return parts


def _candidates(ranking: Ranking, ids: Sequence[str]) -> pa.Table:
    scores, numbers = ranking.scores.ravel(), ranking.documents.ravel()
    # Only documents that are somebody's candidates keep their id.
    used, compact = np.unique(numbers[numbers >= 0], return_inverse=True)
    indices = np.full(len(numbers), -1, np.int32)
    indices[numbers >= 0] = compact
    documents = pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int32(), mask=indices < 0), pa.array(ids, pa.string()).take(pa.array(used))
    )
    return pa.table([pa.array(scores, pa.float32()), documents], schema=_SCHEMA)


def _weight_bytes(encoder: Encoder) -> int:
    return sum(weight.nbytes for weight in encoder.parameters())
