"""The `embed` stage: each unit of the corpus through a fixed pool of workers, one part of vectors a unit."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import ray

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.units import CorpusUnit, corpus_units
from clusterbatch.encoder.embedder import EmbeddedUnit, UnitEmbedder, merge_unknown
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace

__all__ = ["UnitEmbedder", "embed"]

_logger = logging.getLogger(__name__)
# Share of unknown tokens above which clusters and masks of a source mean little.
_UNKNOWN_LIMIT = 0.02


def embed(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Embeds queries and documents of the corpus with `embed.model`; returns the manifest of the embeddings.

    Unit u of the corpus becomes one part, rows in the same order. Details: model (fingerprint), dimensions, tokens, and
    per source the share of unknown tokens.
    """
    workspace = Workspace(config)
    corpus = workspace.corpus.require()
    artifact = workspace.embeddings(generation)
    model = model_fingerprint(resolve_model(config.embed.model, config.storage))
    identity = fingerprint("embeddings", config.embed, model, corpus.fingerprint)
    if artifact.is_done(identity):
        return artifact.require()
    watch = Stopwatch()
    done = artifact.begin(identity, force)
    units = [Unit(unit.number, unit.rows, unit) for unit in corpus_units(corpus)]
    with ray_session(config.ray):
        device, pool = _placement(config)
        arguments = {"config": config, "generation": generation, "identity": identity, "device": device}
        receipts = run_units("embed", units, EmbedWorker, arguments, pool, done=done)
    unknown = merge_unknown([receipt.details["unknown"] for receipt in receipts])
    shares = {source: round(missing / max(tokens, 1), 5) for source, (missing, tokens) in unknown.items()}
    _warn(config.embed.model, shares)
    return artifact.commit(
        identity,
        receipts,
        config=config.embed.model_dump(mode="json"),
        inputs={"corpus": corpus.fingerprint},
        seconds=watch.seconds,
        details={
            "model": model,
            "dimensions": receipts[0].details["dimensions"] if receipts else 0,
            "tokens": sum(receipt.details["tokens"] for receipt in receipts),
            "unknown_share": shares,
        },
    )


class EmbedWorker:
    """One actor: holds the model, turns units into parts."""

    def __init__(self, config: RunConfig, generation: int, identity: str, device: str) -> None:
        self._artifact = Workspace(config).embeddings(generation)
        self._identity = identity
        self._embedder = UnitEmbedder(config, device)

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        corpus_unit: CorpusUnit = unit.payload
        embedded = self._embedder.embed(corpus_unit)
        table = embeddings_table(embedded)
        part = write_parquet(self._artifact, f"unit-{unit.number:08d}", table)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._identity,
            parts=[part],
            counts=Counts(read=corpus_unit.rows, written=table.num_rows),
            seconds=round(watch.seconds, 3),
            details={
                "dimensions": self._embedder.dimensions,
                "tokens": embedded.tokens,
                "unknown": embedded.unknown,
                "progress": f"({embedded.tokens / watch.seconds:,.0f} tokens/s a worker)",
            },
        )
        self._artifact.write_receipt(receipt)
        return receipt


def embeddings_table(embedded: EmbeddedUnit) -> pa.Table:
    """In schema.embeddings_schema; the vectors' memory is shared, not copied."""
    queries, documents = embedded.vectors["query"], embedded.vectors["document"]
    columns = [*embedded.rows.columns, vectors_array(queries), vectors_array(documents)]
    return pa.Table.from_arrays(columns, schema=embeddings_schema(queries.shape[1]))


def vectors_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """(n, d) as FixedSizeList of its own type."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])


def _placement(config: RunConfig) -> tuple[str, Pool]:
    """The device that workers use, and what each asks of the cluster for it."""
    device = config.embed.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= config.embed.gpus_per_worker else "cpu"
    gpus = config.embed.gpus_per_worker if device.startswith("cuda") else 0.0
    return device, Pool(config.embed.workers, config.embed.cpus_per_worker, gpus)


def _warn(model: str, shares: dict[str, float]) -> None:
    for source, share in shares.items():
        if share > _UNKNOWN_LIMIT:
            _logger.warning(
                "embed: %.1f %% of the tokens of source %s are unknown to %s; clusters and masks made with it mean "
                "little there (a model of that language, or embed.model=char-ngrams, would do better)",
                100 * share,
                source,
                model,
            )
