"""The one pass over everything: each row gets its cluster, its token ids, and its place in the shuffle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.buckets import BucketPlan
from clusterbatch.clustering.features import Features, feature_vectors
from clusterbatch.clustering.fitting import Centroids
from clusterbatch.clustering.groups import Groups, row_hashes
from clusterbatch.clustering.tasks import TaskUnit, read_vectors
from clusterbatch.corpus.units import read_unit
from clusterbatch.encoder.layout import read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.schema import token_type
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.exchange import write_buckets
from clusterbatch.store.filesystem import StorageConfig

VECTORS = ["query_vector", "document_vector"]


@dataclass(frozen=True)
class Tokenisation:
    """Token ids of the model that is to be trained."""

    model: str
    storage: StorageConfig
    special_tokens: bool
    max_query_tokens: int
    max_document_tokens: int
    # 'query', 'document', and '<source>-query', '<source>-document' where a source has its own; else the model's own.
    prompts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._folder, special_tokens=self.special_tokens)

    @cached_property
    def _folder(self) -> str:
        return resolve_model(self.model, self.storage)

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return {**read_layout(self._folder).prompts, **self.prompts}

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def queries(self, texts: list[str], sources: Sequence[str]) -> Tokens:
        return self._tokens("query", texts, sources, self.max_query_tokens)

    def documents(self, texts: list[str], sources: Sequence[str]) -> Tokens:
        return self._tokens("document", texts, sources, self.max_document_tokens)

    def _tokens(self, kind: str, texts: list[str], sources: Sequence[str], longest: int) -> Tokens:
        if all(name in ("query", "document") for name in self.prompts):
            return self.tokenizer.encode(texts, longest, self._prompts[kind])
        prompts = [self._prompts.get(f"{source}-{kind}", self._prompts[kind]) for source in sources]
        return self.tokenizer.encode([prompt + text for prompt, text in zip(prompts, texts, strict=True)], longest)


class AssignWorker:
    """Reads corpus and vectors of a task, writes its rows bucketed by the range of clusters they belong to."""

    def __init__(
        self,
        corpus: Artifact,
        embeddings: Artifact,
        output: Artifact,
        fingerprint: str,
        groups: Groups,
        centroids: list[Centroids],
        plan: BucketPlan,
        tokenisation: Tokenisation,
        features: Features,
        seed: int,
    ) -> None:
        self._corpus, self._embeddings, self._exchange = corpus, embeddings, output
        self._fingerprint = fingerprint
        self._groups, self._plan = groups, plan
        self._assigners = {
            group: Assigner(torch.from_numpy(found.centroids))
            for group, found in enumerate(centroids)
            if found.centroids is not None
        }
        self._tokenisation = tokenisation
        self._features: Features = features
        self._seed = seed

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        table = pa.concat_tables([self._rows(item) for item in unit.payload])
        buckets = self._plan.of_rows(table["cluster"].to_numpy(), table["hash"].to_numpy())
        rows = np.bincount(buckets, minlength=self._plan.buckets).tolist()
        part = write_buckets(self._exchange, unit.number, table, buckets, self._plan.buckets, bucket_rows=rows)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=unit.rows, written=table.num_rows),
            seconds=watch.seconds,
        )
        self._exchange.write_receipt(receipt)
        return receipt

    def _rows(self, item: TaskUnit) -> pa.Table:
        rows = read_unit(self._corpus, item.unit)
        vectors = read_vectors(self._embeddings, item, ["pair_id", *VECTORS])
        if not vectors["pair_id"].equals(rows["pair_id"]):
            raise DataError(
                f"{self._embeddings.folder.uri}/{item.embeddings.path}: its rows are not those of unit "
                f"{item.unit.number} of the corpus"
            )
        cluster, cosine = self._assign(self._groups.of_rows(rows["source"]), vectors)
        kind = token_type(self._tokenisation.tokenizer.vocabulary)
        sources = rows["source"].to_pylist()
        columns = {
            "cluster": cluster,
            "hash": row_hashes(rows["pair_id"], self._seed),
            "cosine": cosine,
            **{name: rows[name] for name in rows.column_names if name != "group"},
            "query_tokens": self._tokenisation.queries(rows["query"].to_pylist(), sources).to_arrow(kind),
            "document_tokens": self._tokenisation.documents(rows["document"].to_pylist(), sources).to_arrow(kind),
            **{name: vectors[name] for name in VECTORS},
        }
        if "negatives" in rows.column_names:
            columns["negative_tokens"] = self._negatives(rows["negatives"].combine_chunks(), sources, kind)
        return pa.table(columns)

    def _assign(self, groups: np.ndarray, vectors: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) int32 cluster, numbered through all groups, and (rows,) float32 cosine, NaN where not clustered."""
        first = self._groups.first_cluster
        cluster = first[groups].astype(np.int32)
        cosine = np.full(len(groups), np.nan, np.float32)
        for group in np.unique(groups).tolist():
            if group in self._assigners:
                of_group = np.flatnonzero(groups == group)
                found = self._assigners[group](
                    torch.from_numpy(feature_vectors(vectors.take(of_group), self._features))
                )
                cluster[of_group] += found.labels.numpy().astype(np.int32)
                cosine[of_group] = found.cosine.numpy()
        return cluster, cosine

    def _negatives(self, negatives: pa.ListArray, sources: list[str], kind: pa.DataType) -> pa.ListArray:
        """list<list<token>>: the tokens of each row's negatives; no list where there was none."""
        lengths = negatives.value_lengths().fill_null(0).to_numpy()
        owners = [sources[row] for row in np.repeat(np.arange(len(sources)), lengths).tolist()]
        tokens = self._tokenisation.documents(negatives.flatten().to_pylist(), owners).to_arrow(kind)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), tokens)
