"""One unit of an evaluation: embed a range of a collection's documents and keep each query's best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.encoder.model import Encoder, load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.models import EvaluatedModel
from clusterbatch.evaluation.search import Ranking, descending_ids, search
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.tables import read_parquet, write_parquet

# Folder inside the artifact for what is merged and then removed.
CANDIDATES = "candidates"
_SCHEMA = pa.schema(
    [
        pa.field("score", pa.float32(), nullable=False),
        # Null where the range has fewer documents than are kept.
        pa.field("document", pa.dictionary(pa.int32(), pa.string())),
    ]
)


@dataclass(frozen=True)
class ShardTask:
    """Documents of `collection` in bytes [start, end) of its file, by `model`; queries are cut into blocks."""

    model: EvaluatedModel
    collection: Collection
    start: int
    end: int
    query_block: int


class SearchWorker:
    """Holds one encoder and the vectors of one collection's queries, those that the last unit needed."""

    def __init__(self, artifact: Artifact, fingerprint: str, config: RunConfig) -> None:
        self._artifact, self._fingerprint, self._config = artifact, fingerprint, config
        self._encoder: Encoder | None = None
        self._model: EvaluatedModel | None = None
        self._queries: _Queries | None = None

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        task: ShardTask = unit.payload
        encoder = self._load(task.model)
        queries = self._load_queries(task, encoder)
        ids, texts = task.collection.read_documents(task.start, task.end)
        order = descending_ids(ids)
        ids = [ids[row] for row in order]
        ranking = search(
            queries.vectors,
            self._embed(encoder, "document", [texts[row] for row in order]),
            self._config.evaluate.top_k,
            queries.excluded(ids) if self._config.evaluate.ignore_identical_ids else None,
        )
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=_write_candidates(self._artifact, unit.number, ranking, ids, task.query_block),
            counts=Counts(read=len(ids), written=len(ids)),
            seconds=watch.seconds,
            details={"judged": len(queries.judged.intersection(ids))},
        )
        self._artifact.write_receipt(receipt)
        return receipt

    def _load(self, model: EvaluatedModel) -> Encoder:
        if self._encoder is None or self._model != model:
            self._encoder = self._queries = None
            folder = resolve_model(model.name, self._config.storage)
            self._encoder = load_encoder(folder, model.encoder, device=_device(self._config.evaluate.device))
            self._model = model
        return self._encoder

    def _load_queries(self, task: ShardTask, encoder: Encoder) -> _Queries:
        if self._queries is None or self._queries.collection != task.collection:
            judgements = task.collection.read_judgements()
            texts = task.collection.read_queries(judgements)
            self._queries = _Queries(
                task.collection,
                list(texts),
                {document for grades in judgements.values() for document in grades},
                self._embed(encoder, "query", list(texts.values())),
            )
        return self._queries

    def _embed(self, encoder: Encoder, kind: Literal["query", "document"], texts: list[str]) -> torch.Tensor:
        """(N, D) float32 on the encoder's device, with the model's own prompt for this kind of text."""
        settings = self._config.evaluate
        limit = settings.max_query_tokens if kind == "query" else settings.max_document_tokens
        if encoder.max_tokens:
            limit = min(limit, encoder.max_tokens)
        tokens = encoder.tokenizer.encode(texts, limit, encoder.prompts[kind])
        return torch.from_numpy(encoder.encode(tokens, self._config.embed.batch_tokens)).to(encoder.device)


@dataclass(frozen=True)
class _Queries:
    """The judged queries of a collection: ids, (Q, D) vectors, and the ids of all judged documents."""

    collection: Collection
    ids: list[str]
    judged: set[str]
    vectors: torch.Tensor

    def excluded(self, documents: Sequence[str]) -> np.ndarray | None:
        """(Q,) int64: the number of the document that has the query's own id, -1 where there is none."""
        numbers = {identifier: number for number, identifier in enumerate(documents)}
        excluded = np.array([numbers.get(query, -1) for query in self.ids], dtype=np.int64)
        return excluded if (excluded >= 0).any() else None


def read_candidates(artifact: Artifact, part: Part) -> tuple[Ranking, list[str]]:
    """One block of queries over one range of documents: the ranking, and the ids that its numbers mean."""
    table = read_parquet(artifact.folder, part.path)
    k = part.details["top_k"]
    documents = table["document"].combine_chunks()
    numbers = documents.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    scores = table["score"].to_numpy()
    return Ranking(scores.reshape(-1, k), numbers.reshape(-1, k)), documents.dictionary.to_pylist()


def _write_candidates(
    artifact: Artifact, unit: int, ranking: Ranking, ids: Sequence[str], query_block: int
) -> list[Part]:
    parts = []
    names = pa.array(ids, pa.string())
    for block, first in enumerate(range(0, len(ranking), query_block)):
        scores = ranking.scores[first : first + query_block].ravel()
        numbers = ranking.documents[first : first + query_block].ravel()
        # Only documents that are somebody's candidates keep their id.
        used, compact = np.unique(numbers[numbers >= 0], return_inverse=True)
        indices = np.full(len(numbers), -1, np.int32)
        indices[numbers >= 0] = compact
        documents = pa.DictionaryArray.from_arrays(
            pa.array(indices, pa.int32(), mask=indices < 0), names.take(pa.array(used))
        )
        table = pa.table([pa.array(scores, pa.float32()), documents], schema=_SCHEMA)
        stem = f"{CANDIDATES}/unit-{unit:08d}-{block:04d}"
        parts.append(write_parquet(artifact, stem, table, block=block, top_k=ranking.scores.shape[1]))
    return parts


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
