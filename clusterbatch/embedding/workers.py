"""Workers of the stage `embed`: vectors of a row group, tokens ahead of them, given vectors, surrogate, trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.corpus.row_groups import RowGroup, read_row_group
from clusterbatch.embedding.char_ngrams import SAMPLE_PAIRS, SURROGATES
from clusterbatch.embedding.embedder import EmbeddedUnit, PreparedUnit, Preparer, UnitEmbedder
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Artifact, Counts
from clusterbatch.store.tables import vector_column, write_parquet


class EmbedWorker:
    """Write the vectors of a row group as one part."""

    def __init__(self, config: RunConfig, generation: int, device: str) -> None:
        if device == "cpu":
            # Ray's workers are told to use one thread each; one that was given more cores uses them.
            torch.set_num_threads(max(1, round(config.embed.cpus_per_worker)))
        self._embedder = UnitEmbedder(config, generation, device)

    def process(self, item: WorkItem, output: Artifact, prepared: PreparedUnit | None = None) -> Result:
        group: RowGroup = item.payload
        begun = perf_counter()
        prepared = prepared or self._embedder.prepare(group)
        prepared_at = perf_counter()
        embedded = self._embedder.embed_prepared(prepared)
        embedded_at = perf_counter()
        part = write_parquet(output, _stem(item), embeddings_table(embedded), deleted=group.deleted)
        ended = perf_counter()
        details = {
            "dimensions": self._embedder.dimensions,
            "tokens": embedded.tokens,
            "unknown": embedded.unknown,
            # The first is 0 if other processes prepare ahead.
            "seconds": {
                "prepare": round(prepared_at - begun, 3),
                "encode": round(embedded_at - prepared_at, 3),
                "write": round(ended - embedded_at, 3),
            },
            "progress": f"({embedded.tokens / (ended - begun):,.0f} tokens/s a worker)" if embedded.tokens else "",
        }
        return Result([part], Counts(read=group.rows, written=part.rows), details)


class PrepareWorker:
    """Read and tokenise row groups ahead of the embedding workers."""

    def __init__(self, corpus: Artifact, config: RunConfig) -> None:
        self._preparer = Preparer(corpus, config.embed, config.storage, config.corpus.columns.images)

    def prepare(self, item: WorkItem) -> PreparedUnit:
        return self._preparer.prepare(item.payload)


class ImportWorker:
    """Copy the vectors that came with the corpus."""

    def __init__(self, corpus: Artifact, dimensions: int) -> None:
        self._corpus, self._schema = corpus, embeddings_schema(dimensions)

    def process(self, item: WorkItem, output: Artifact) -> Result:
        group: RowGroup = item.payload
        names = self._schema.names
        table = read_row_group(self._corpus, group, names).select(names).cast(self._schema)
        part = write_parquet(output, _stem(item), table, deleted=group.deleted)
        return Result([part], Counts(read=group.rows, written=part.rows))


class FitSurrogateWorker:
    """Fit a surrogate that needs no model to a uniform sample of the corpus; the one item's payload is all units."""

    def __init__(self, name: str, corpus: Artifact, max_tokens: int | None) -> None:
        self._name, self._corpus, self._max_tokens = name, corpus, max_tokens

    def process(self, item: WorkItem, output: Artifact) -> Result:
        texts = sample_texts(self._corpus, item.payload, SAMPLE_PAIRS)
        data = SURROGATES[self._name].fit(texts, self._max_tokens).to_bytes()
        return Result([output.write_part("surrogate", "safetensors", data, 0)])


class TrialWorker:
    """Describe a corpus whose vectors are not stored, from a uniform sample; one item, whose payload is all units.

    Details of its result: dimensions, and [unknown tokens, tokens] by source.
    """

    def __init__(self, config: RunConfig, generation: int) -> None:
        self._embedder = UnitEmbedder(config, generation, "cpu")

    def process(self, item: WorkItem, output: Artifact | None) -> Result:
        unknown: dict[str, np.ndarray] = {}
        for group, rows in sample_rows(item.payload, SAMPLE_PAIRS):
            for source, counts in self._embedder.prepare(group, rows).unknown.items():
                unknown[source] = unknown.get(source, np.zeros(2, np.int64)) + counts
        counted = {source: counts.tolist() for source, counts in unknown.items()}
        return Result(details={"dimensions": self._embedder.dimensions, "unknown": counted})


def sample_rows(groups: Sequence[RowGroup], pairs: int, seed: int = 0) -> Iterator[tuple[RowGroup, np.ndarray]]:
    """Draw up to `pairs` rows of a corpus uniformly; yield the row groups that hold some, and row numbers inside."""
    starts = np.concatenate([[0], np.cumsum([group.rows for group in groups])])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(pairs, total), replace=False))
    for group, start, end in zip(groups, starts[:-1], starts[1:], strict=True):
        rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
        if len(rows):
            yield group, rows


def sample_texts(corpus: Artifact, groups: Sequence[RowGroup], pairs: int, seed: int = 0) -> list[str]:
    """Return queries and documents of `sample_rows`, read one row group after the other."""
    texts: list[str] = []
    for group, rows in sample_rows(groups, pairs, seed):
        table = read_row_group(corpus, group, ["query", "document"]).take(pa.array(rows))
        texts += table["query"].to_pylist() + table["document"].to_pylist()
    return texts


def embeddings_table(embedded: EmbeddedUnit) -> pa.Table:
    """Return the vectors in `schema.embeddings_schema`, sharing their memory."""
    queries, documents = embedded.vectors["query"], embedded.vectors["document"]
    columns = [*embedded.rows.columns, vector_column(queries), vector_column(documents)]
    return pa.Table.from_arrays(columns, schema=embeddings_schema(queries.shape[1]))


def _stem(item: WorkItem) -> str:
    return f"unit-{item.number:08d}"
