"""One work item of an evaluation: embed ranges of a collection's documents and keep each query's best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import DataError, about
from clusterbatch.evaluation.bm25 import LexicalIndex
from clusterbatch.evaluation.collection import Collection, Texts
from clusterbatch.evaluation.models import EvaluatedModel, load
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search.topk import Ranking, descending_ids, identical_ids, merge, search
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.tables import read_parquet, write_parquet

# Folder inside the artifact for candidates, which are merged and then removed.
CANDIDATES = "candidates"
# Weights that a worker keeps between units; beyond that it loads them again, which costs less than memory.
_KEPT_BYTES = 2 * 2**30
_SCHEMA = pa.schema(
    [
        pa.field("score", pa.float32(), nullable=False),
        # Null if the ranges have fewer documents than are kept.
        pa.field("document", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardTask:
    """Documents of `collection` in byte ranges [start, end) of its file, by all `models`.

    query_block: queries of a row group, which are merged at once. A lexical task is the whole collection at once: BM25
    weighs words by all documents.
    """

    models: tuple[EvaluatedModel, ...]
    collection: Collection
    ranges: tuple[tuple[int, int], ...]
    query_block: int
    lexical: bool = False


class SearchWorker:
    """Put ranges of documents through all models, so that those with one tokenizer share the tokens.

    Keeps encoders as long as they are small, and the queries of the last collection.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._encoders: dict[EvaluatedModel, Encoder] = {}
        # Of all encoders so far, also of those that were not kept.
        self._dtypes: set[str] = set()
        self._queries: _Queries | None = None

    def process(self, item: WorkItem, output: Artifact) -> Result:
        task: ShardTask = item.payload
        if self._queries is None or self._queries.collection != task.collection:
            self._queries = _Queries(task.collection, self._config)
        queries = self._queries
        best: dict[EvaluatedModel, Candidates] = {}
        read = judged = 0
        for start, end in task.ranges:
            ids, texts = task.collection.read_documents(start, end)
            order = descending_ids(ids)
            ids = [ids[row] for row in order]
            documents = Texts("document", [texts[row] for row in order], self._config.evaluate.max_document_tokens)
            for model in task.models:
                found = best_candidates(self._search(task, model, queries, documents, ids), ids)
                best[model] = merge_candidates([best[model], found], task.collection.name) if model in best else found
            read += len(ids)
            judged += len(queries.judged.intersection(ids))
        parts = [_write(output, item.number, task, model, candidates) for model, candidates in best.items()]
        # The reference reads documents that other items count already.
        counts = Counts() if task.lexical else Counts(read=read, written=read)
        ranges = [list(pair) for pair in task.ranges]
        return Result(parts, counts, {"judged": judged, "ranges": ranges, "dtypes": sorted(self._dtypes)})

    def _search(
        self, task: ShardTask, model: EvaluatedModel, queries: _Queries, documents: Texts, ids: Sequence[str]
    ) -> Ranking:
        excluded = queries.excluded(ids) if self._config.evaluate.ignore_identical_ids else None
        top_k = self._config.evaluate.top_k
        if task.lexical:
            documents.check_texts(model.label)
            return LexicalIndex(documents.texts).search(queries.texts, top_k, excluded)
        encoder = self._encoder(model)
        vectors = documents.vectors(encoder, self._config.embed.batch_tokens)
        with about(f"evaluate.models: {model.label}"):
            return search(queries.vectors(model, encoder), vectors, top_k, excluded)

    def _encoder(self, model: EvaluatedModel) -> Encoder:
        if model not in self._encoders:
            held = sum(_weight_bytes(encoder) for encoder in self._encoders.values())
            if held > _KEPT_BYTES:
                self._encoders.clear()
            self._encoders[model] = encoder = load(model, self._config)
            self._dtypes.add(str(encoder.dtype).removeprefix("torch."))
        return self._encoders[model]


class _Queries:
    """Judged queries of a collection: ids, vectors by model, and the ids of all judged documents."""

    def __init__(self, collection: Collection, config: RunConfig) -> None:
        judgements = collection.read_judgements()
        texts = collection.read_queries(judgements)
        self.collection = collection
        self.judged = {document for grades in judgements.values() for document in grades}
        self._judgements = judgements
        self._ids = list(texts)
        self.texts = list(texts.values())
        self._texts = Texts("query", self.texts, config.evaluate.max_query_tokens)
        self._batch_tokens = config.embed.batch_tokens
        self._vectors: dict[EvaluatedModel, torch.Tensor] = {}

    def vectors(self, model: EvaluatedModel, encoder: Encoder) -> torch.Tensor:
        """Return (Q, D) float32."""
        if model not in self._vectors:
            self._vectors[model] = self._texts.vectors(encoder, self._batch_tokens)
        return self._vectors[model]

    def excluded(self, documents: Sequence[str]) -> np.ndarray | None:
        """Return (Q,) int64: the number of the document that has the query's own id, -1 if there is none."""
        return identical_ids(self._ids, documents, self._judgements)


@dataclass(frozen=True)
class Candidates:
    """Best documents of some queries so far: the ranking, and the ids that its numbers stand for."""

    ranking: Ranking
    ids: list[str]


def best_candidates(ranking: Ranking, ids: Sequence[str]) -> Candidates:
    """Return candidates that keep the ids of ranked documents only, in the order of `ids`."""
    numbers = ranking.documents
    used, compact = np.unique(numbers[numbers >= 0], return_inverse=True)
    renumbered = np.full(numbers.shape, -1, np.int64)
    renumbered[numbers >= 0] = compact
    return Candidates(Ranking(ranking.scores, renumbered), [ids[number] for number in used.tolist()])


def merge_candidates(pieces: Sequence[Candidates], collection: str) -> Candidates:
    """Return the best of candidates for the same queries among different documents of a collection.

    Raises DataError if a document id is in two of them.
    """
    names = [name for piece in pieces for name in piece.ids]
    if len(set(names)) < len(names):
        raise DataError(f"collection {collection}: a document id occurs twice in its corpus.jsonl")
    order = descending_ids(names)
    number = np.empty(len(names), np.int64)
    number[order] = np.arange(len(names))
    rankings, first = [], 0
    for piece in pieces:
        # Position -1 (no candidate) must stay -1.
        in_all = np.append(number[first : first + len(piece.ids)], -1)
        rankings.append(Ranking(piece.ranking.scores, in_all[piece.ranking.documents]))
        first += len(piece.ids)
    best = merge(rankings, pieces[0].ranking.scores.shape[1])
    return best_candidates(best, [names[row] for row in order])


def read_candidates(artifact: Artifact, part: Part, block: int) -> Candidates:
    """Read one block of queries of a part."""
    table = read_parquet(artifact.folder, part, row_groups=[block])
    k = part.details["top_k"]
    documents = table["document"].combine_chunks().dictionary_encode()
    numbers = documents.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    scores = table["score"].to_numpy()
    ranking = Ranking(scores.reshape(-1, k), numbers.reshape(-1, k))
    return best_candidates(ranking, documents.dictionary.to_pylist())


def _write(output: Artifact, number: int, task: ShardTask, model: EvaluatedModel, candidates: Candidates) -> Part:
    """Write an item's candidates by one model, one row group for each block of queries."""
    scores, numbers = candidates.ranking.scores, candidates.ranking.documents.ravel()
    k = scores.shape[1]
    documents = pa.array(candidates.ids, pa.string()).take(pa.array(numbers, pa.int64(), mask=numbers < 0))
    table = pa.table([pa.array(scores.ravel(), pa.float32()), documents], schema=_SCHEMA)
    stem = f"{CANDIDATES}/unit-{number:08d}-{task.models.index(model):02d}"
    return write_parquet(output, stem, table, task.query_block * k, model=model.label, top_k=k)


def _weight_bytes(encoder: Encoder) -> int:
    return sum(weight.nbytes for weight in encoder.parameters())
