"""The `embed` stage: each unit of the corpus through a fixed pool of workers, one part of vectors a unit.

What workers that run the embedding model ask of the cluster.

Embeddings from vectors that came with the corpus (`corpus.columns.vector`): no model, parts of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from clusterbatch.config import EmbedConfig, RunConfig, fingerprint
from clusterbatch.corpus.row_groups import RowGroup, read_row_group, row_groups_of
from clusterbatch.embedding.char_ngrams import SAMPLE_PAIRS, SURROGATES
from clusterbatch.embedding.embedder import UnitEmbedder, surrogate_artifact
from clusterbatch.embedding.workers import EmbedWorker, FitSurrogateWorker, PrepareWorker, TrialWorker
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.log import say
from clusterbatch.runtime import Ahead, Pool, Unit, current_executor, ray_session, run_units
from clusterbatch.runtime.resources import device_for, gpus_for
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Artifact, Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.versions import GrowingArtifact, made_before
from clusterbatch.store.workspace import Workspace


def embedding_pool(settings: EmbedConfig) -> Pool:
    """Of the stage `embed`, and of every pass that embeds rows itself: a sample, or where vectors are not kept.

    Ray shows a worker the GPUs that it asked for and no others: one that asked for none could not embed on one.
    """
    gpus = gpus_for(settings.device, settings.workers, settings.gpus_per_worker)
    return Pool(settings.workers, settings.cpus_per_worker, gpus)


MODEL = "imported"


class ImportWorker:
    """Copies the vectors of one unit of the corpus."""

    def __init__(self, corpus: Artifact, artifact: Artifact, identity: str, dimensions: int) -> None:
        self._corpus, self._artifact = corpus, artifact
        self._identity, self._schema = identity, embeddings_schema(dimensions)

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        corpus_unit: RowGroup = unit.payload
        table = (
            read_row_group(self._corpus, corpus_unit, self._schema.names).select(self._schema.names).cast(self._schema)
        )
        part = write_parquet(self._artifact, f"unit-{unit.number:08d}", table, deleted=corpus_unit.deleted)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._identity,
            parts=[part],
            counts=Counts(read=corpus_unit.rows, written=part.rows),
            seconds=round(watch.seconds, 3),
        )
        self._artifact.write_receipt(receipt)
        return receipt


def import_identity(corpus: str) -> str:
    """The fingerprint of the embeddings that are made of the corpus of that fingerprint."""
    return fingerprint("embeddings", MODEL, corpus)


def import_vectors(
    config: RunConfig, corpus: Artifact, manifest: Manifest, artifact: GrowingArtifact, force: bool
) -> Manifest:
    """The manifest of embeddings made of the corpus' own vectors; what `embed` does where there are some."""
    identity = import_identity(manifest.fingerprint)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    watch = Stopwatch()
    base = None if force else made_before(artifact, import_identity, manifest)
    target = artifact.next_version(base) if base else artifact
    done = target.begin(identity, force)
    dimensions = int(manifest.details["dimensions"])
    there = len(base.parts) if base else 0
    units = [Unit(unit.number, unit.rows, unit) for unit in row_groups_of(manifest)[there:]]
    arguments: Mapping[str, object] = {
        "corpus": corpus,
        "artifact": target,
        "identity": identity,
        "dimensions": dimensions,
    }
    with ray_session(config.ray):
        receipts = run_units("embed: import", units, ImportWorker, arguments, Pool(config.embed.workers), done=done)
    return target.commit(
        identity,
        receipts,
        config={},
        inputs={"corpus": manifest.fingerprint},
        seconds=watch.seconds,
        details={"model": MODEL, "persisted": True, "dimensions": dimensions, "tokens": 0, "unknown_share": {}},
    )


__all__ = ["UnitEmbedder", "embed"]

# Share of unknown tokens above which clusters and masks of a source mean little.
_UNKNOWN_LIMIT = 0.02
_TOKENIZERS_PER_GPU_WORKER = 8


def embed(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Embeds queries and documents of the corpus with `embed.model`; returns the manifest of the embeddings.

    Unit u of the corpus becomes one part, rows in the same order. With `embed.persist: false` there are no parts: what
    needs vectors asks a `UnitEmbedder`. Of a corpus that has grown since, the new units alone are embedded, as a
    version that goes on from the embeddings there are.

    Details: model (fingerprint), persisted, dimensions, and of what was embedded here: rows, tokens, for each source
    the share of unknown tokens (of a sample where vectors are not kept), and seconds of all workers by step.
    """
    workspace = Workspace(config)
    corpus = workspace.corpus.require()
    artifact = workspace.embeddings(generation)
    if _has_vectors(corpus, generation):
        return import_vectors(config, workspace.corpus, corpus, artifact, force)
    model = _model_identity(config)
    identity_of = partial(_identity, config, model)
    identity = identity_of(corpus.fingerprint)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    watch = Stopwatch()
    base = None if force else made_before(artifact, identity_of, corpus)
    target = artifact.next_version(base) if base else artifact
    done = target.begin(identity, force)
    there = len(base.parts) if base else 0
    units = [Unit(unit.number, unit.rows, unit) for unit in row_groups_of(corpus)[there:]]
    with ray_session(config.ray):
        if model in SURROGATES and units and base is None:
            _fit_surrogate(config, workspace.corpus, surrogate_artifact(artifact), identity, units)
        receipts: list[Receipt] = []
        trial: list[Receipt] = []
        if config.embed.persist:
            device, pool, ahead = _placement(config, workspace.corpus)
            arguments = {
                "config": config,
                "generation": generation,
                "artifact": target,
                "identity": identity,
                "device": device,
            }
            receipts = run_units("embed", units, EmbedWorker, arguments, pool, done=done, ahead=ahead)
        elif units:
            arguments = {"config": config, "generation": generation, "identity": identity}
            pool = Pool(1, config.embed.cpus_per_worker)
            trial = run_units("embed: trial", [_all_in_one(units)], TrialWorker, arguments, pool)
    seen = receipts or trial
    shares = unknown_shares([receipt.details["unknown"] for receipt in seen])
    warn_of_unknown(config.embed.model, shares)
    return target.commit(
        identity,
        receipts,
        config=config.embed.model_dump(mode="json"),
        inputs={"corpus": corpus.fingerprint},
        seconds=watch.seconds,
        details={
            "model": model,
            "persisted": config.embed.persist,
            "dimensions": seen[0].details["dimensions"] if seen else base and base.details["dimensions"],
            "rows": sum(receipt.counts.written for receipt in receipts),
            "tokens": sum(receipt.details["tokens"] for receipt in receipts),
            "unknown_share": shares,
            "seconds": {
                step: round(sum(receipt.details["seconds"][step] for receipt in receipts), 1)
                for step in ("prepare", "encode", "write")
            },
        },
    )


def is_embedded(config: RunConfig, generation: int) -> bool:
    """Whether a generation's vectors are `embed.model`'s, of this or an earlier version of the corpus."""
    workspace = Workspace(config)
    corpus, made = workspace.corpus.require(), workspace.embeddings(generation).manifest()
    identity_of = partial(_identity, config, _model_identity(config))
    return made is not None and made.fingerprint in map(identity_of, corpus.lineage)


def _has_vectors(corpus: Manifest, generation: int) -> bool:
    # A later generation is embedded by a model, whatever the first one's vectors were.
    return corpus.details.get("dimensions") is not None and generation == 0


def _model_identity(config: RunConfig) -> str:
    name = config.embed.model
    return name if name in SURROGATES else model_fingerprint(resolve_model(name, config.storage))


def _identity(config: RunConfig, model: str, corpus: str) -> str:
    return fingerprint("embeddings", config.embed, model, corpus)


def unknown_shares(counts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """Share of unknown tokens by source, from [unknown tokens, tokens] of many units."""
    total: dict[str, np.ndarray] = {}
    for unit in counts:
        for source, pair in unit.items():
            total[source] = total.get(source, np.zeros(2, np.int64)) + np.asarray(pair)
    return {source: round(float(unknown / max(tokens, 1)), 5) for source, (unknown, tokens) in sorted(total.items())}


def warn_of_unknown(model: str, shares: Mapping[str, float]) -> None:
    for source, share in shares.items():
        if share > _UNKNOWN_LIMIT:
            say(
                f"embed: {100 * share:.1f} % of the tokens of source {source} are unknown to {model}: clusters and "
                "masks made with it mean little there (take a model of that language, or embed.model=char-ngrams)",
                level="warning",
                source=source,
                share=share,
            )


def _fit_surrogate(
    config: RunConfig, corpus: Artifact, artifact: Artifact, identity: str, units: Sequence[Unit]
) -> None:
    if artifact.is_done(identity):
        return
    done = artifact.begin(identity, force=True)
    arguments = {
        "name": config.embed.model,
        "corpus": corpus,
        "artifact": artifact,
        "identity": identity,
        "max_tokens": config.embed.max_tokens,
    }
    pool = Pool(1, config.embed.cpus_per_worker)
    receipts = run_units("surrogate", [_all_in_one(units)], FitSurrogateWorker, arguments, pool, done=done)
    artifact.commit(identity, receipts, config={}, inputs={}, seconds=receipts[0].seconds)


def _all_in_one(units: Sequence[Unit]) -> Unit:
    """For workers that look at a sample of the corpus."""
    rows = sum(unit.rows for unit in units)
    return Unit(0, min(rows, SAMPLE_PAIRS), [unit.payload for unit in units])


def _placement(config: RunConfig, corpus: Artifact) -> tuple[str, Pool, Ahead | None]:
    """The device of the workers, what each asks of the cluster, and who tokenises ahead of them."""
    settings = config.embed
    device, pool = device_for(settings.device), embedding_pool(settings)
    tokenizers = settings.tokenizers or 0
    if settings.tokenizers is None and pool.gpus:
        left = int((current_executor().resources().get("CPU", 0) - pool.workers * pool.cpus) / Pool.cpus)
        tokenizers = min(_TOKENIZERS_PER_GPU_WORKER * pool.workers, max(left, 0))
    arguments = {"corpus": corpus, "config": config}
    return device, pool, Ahead(PrepareWorker, arguments, Pool(tokenizers)) if tokenizers else None
