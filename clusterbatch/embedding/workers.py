"""What the actors of the `embed` stage do with a unit; no Ray here, so that it also runs in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.corpus.row_groups import RowGroup, read_row_group
from clusterbatch.embedding.char_ngrams import SAMPLE_PAIRS, SURROGATES
from clusterbatch.embedding.embedder import EmbeddedUnit, PreparedUnit, Preparer, UnitEmbedder
from clusterbatch.runtime import Unit
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet


class EmbedWorker:
    """One actor: holds the model, turns units into parts."""

    def __init__(self, config: RunConfig, generation: int, artifact: Artifact, identity: str, device: str) -> None:
        self._artifact, self._identity = artifact, identity
        if device == "cpu":
            # Ray's workers are told to use one thread each; one that was given more cores uses them.
            torch.set_num_threads(max(1, round(config.embed.cpus_per_worker)))
        self._embedder = UnitEmbedder(config, generation, device)

    def process(self, unit: Unit, prepared: PreparedUnit | None = None) -> Receipt:
        """Embeds the unit; `prepared` where other processes read and tokenise ahead."""
        watch = Stopwatch()
        corpus_unit: RowGroup = unit.payload
        prepared = prepared or self._embedder.prepare(corpus_unit)
        prepared_at = watch.seconds
        embedded = self._embedder.embed_prepared(prepared)
        embedded_at = watch.seconds
        stem = f"unit-{unit.number:08d}"
        part = write_parquet(self._artifact, stem, embeddings_table(embedded), deleted=corpus_unit.deleted)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._identity,
            parts=[part],
            counts=Counts(read=corpus_unit.rows, written=part.rows),
            seconds=round(watch.seconds, 3),
            details={
                "dimensions": self._embedder.dimensions,
                "tokens": embedded.tokens,
                "unknown": embedded.unknown,
                # Where the time goes; the first is 0 where other processes do it ahead.
                "seconds": {
                    "prepare": round(prepared_at, 3),
                    "encode": round(embedded_at - prepared_at, 3),
                    "write": round(watch.seconds - embedded_at, 3),
                },
                "progress": f"({embedded.tokens / watch.seconds:,.0f} tokens/s a worker)" if embedded.tokens else "",
            },
        )
        self._artifact.write_receipt(receipt)
        return receipt


class PrepareWorker:
    """One actor of the pool that reads and tokenises ahead of the embedding workers."""

    def __init__(self, corpus: Artifact, config: RunConfig) -> None:
        self._preparer = Preparer(corpus, config.embed, config.storage, config.corpus.columns.images)

    def prepare(self, unit: Unit) -> PreparedUnit:
        return self._preparer.prepare(unit.payload)


class FitSurrogateWorker:
    """Fits a surrogate that needs no model to a uniform sample of the corpus; its one unit's payload is all units."""

    def __init__(self, name: str, corpus: Artifact, artifact: Artifact, identity: str, max_tokens: int | None) -> None:
        self._name, self._corpus, self._artifact = name, corpus, artifact
        self._identity, self._max_tokens = identity, max_tokens

    def process(self, unit: Unit) -> Receipt:
        texts = sample_texts(self._corpus, unit.payload, SAMPLE_PAIRS)
        data = SURROGATES[self._name].fit(texts, self._max_tokens).to_bytes()
        part = self._artifact.write_part("surrogate", "safetensors", data, 0)
        receipt = Receipt(unit=unit.number, fingerprint=self._identity, parts=[part])
        self._artifact.write_receipt(receipt)
        return receipt


class TrialWorker:
    """What the stage says of a corpus whose vectors it does not keep, from a uniform sample; one unit, of all units.

    Details of its receipt: dimensions, and unknown tokens by source.
    """

    def __init__(self, config: RunConfig, generation: int, identity: str) -> None:
        self._embedder = UnitEmbedder(config, generation, "cpu")
        self._identity = identity

    def process(self, unit: Unit) -> Receipt:
        unknown: dict[str, np.ndarray] = {}
        for corpus_unit, rows in sample_rows(unit.payload, SAMPLE_PAIRS):
            for source, counts in self._embedder.prepare(corpus_unit, rows).unknown.items():
                unknown[source] = unknown.get(source, np.zeros(2, np.int64)) + counts
        counted = {source: counts.tolist() for source, counts in unknown.items()}
        details = {"dimensions": self._embedder.dimensions, "unknown": counted}
        return Receipt(unit=unit.number, fingerprint=self._identity, details=details)


def sample_rows(units: Sequence[RowGroup], pairs: int, seed: int = 0) -> Iterator[tuple[RowGroup, np.ndarray]]:
    """Up to `pairs` rows of a corpus, drawn uniformly: the units that hold some, and their row numbers inside it."""
    starts = np.concatenate([[0], np.cumsum([unit.rows for unit in units])])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(pairs, total), replace=False))
    for unit, start, end in zip(units, starts[:-1], starts[1:], strict=True):
        rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
        if len(rows):
            yield unit, rows


def sample_texts(corpus: Artifact, units: Sequence[RowGroup], pairs: int, seed: int = 0) -> list[str]:
    """Queries and documents of `sample_rows`, read unit by unit."""
    texts: list[str] = []
    for unit, rows in sample_rows(units, pairs, seed):
        table = read_row_group(corpus, unit, ["query", "document"]).take(pa.array(rows))
        texts += table["query"].to_pylist() + table["document"].to_pylist()
    return texts


def embeddings_table(embedded: EmbeddedUnit) -> pa.Table:
    """In schema.embeddings_schema; the vectors' memory is shared, not copied."""
    queries, documents = embedded.vectors["query"], embedded.vectors["document"]
    columns = [*embedded.rows.columns, _vectors_array(queries), _vectors_array(documents)]
    return pa.Table.from_arrays(columns, schema=embeddings_schema(queries.shape[1]))


def _vectors_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])
