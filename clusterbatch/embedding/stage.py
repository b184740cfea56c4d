"""The stage `embed`: vectors of every row group of the corpus, one part each.

They are computed by `embed.model`, or copied if they came with the corpus (`corpus.columns.vector`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from clusterbatch.config import EmbedConfig, RunConfig, fingerprint
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.char_ngrams import SAMPLE_PAIRS, SURROGATES
from clusterbatch.embedding.embedder import surrogate_artifact
from clusterbatch.embedding.workers import EmbedWorker, FitSurrogateWorker, ImportWorker, PrepareWorker, TrialWorker
from clusterbatch.encoder.limits import check_limits, embedding_limits
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.log import say
from clusterbatch.runtime import Ahead, Pass, Pool, WorkItem, current_executor, ray_session
from clusterbatch.runtime.resources import device_for, gpus_for
from clusterbatch.store import Artifact, Manifest, Receipt, Stopwatch
from clusterbatch.store.details import CorpusDetails, EmbeddedUnit, EmbeddingsDetails, details_of, given_dimensions
from clusterbatch.store.growing import GrowingArtifact, made_before
from clusterbatch.store.workspace import Workspace

# Name in manifests for the model of vectors that came with the corpus.
_IMPORTED = "imported"
# Share of unknown tokens above which clusters and masks of a source mean little.
_UNKNOWN_LIMIT = 0.02
_TOKENIZERS_PER_GPU_WORKER = 8


def embed(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Embed queries and documents of the corpus with `embed.model`; return the manifest of the embeddings.

    Each row group of the corpus becomes one part, rows in the same order. With `embed.persist: false` there are no
    parts: passes that need vectors ask a `UnitEmbedder`. If the corpus has grown, only the new row groups are embedded,
    as a version that continues the existing embeddings.

    Details: model (fingerprint), persisted, dimensions, and of what was embedded here: rows, tokens, for each source
    the share of unknown tokens (of a sample if vectors are not stored), and seconds of all workers by step.
    """
    workspace = Workspace(config)
    corpus = workspace.corpus.require()
    artifact = workspace.embeddings(generation)
    if _has_vectors(corpus, generation):
        return _import_vectors(config, workspace.corpus, corpus, artifact, force)
    model = _model_identity(config)
    identity_of = partial(_identity, config, model)
    identity = identity_of(corpus.fingerprint)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    if model not in SURROGATES:
        check_limits(config.embed.model, config.storage, embedding_limits(config))
    workspace.corpus.check_parts(corpus)
    watch = Stopwatch()
    base, target, items = _continued(artifact, identity_of, corpus, force)
    done = target.begin(identity, force)
    receipts: list[Receipt] = []
    trial: list[Receipt] = []
    with ray_session(config.ray):
        if model in SURROGATES and items and base is None:
            _fit_surrogate(config, workspace.corpus, surrogate_artifact(artifact), identity, items)
        if config.embed.persist:
            device, pool, ahead = _placement(config, workspace.corpus)
            arguments = {"config": config, "generation": generation, "device": device}
            receipts = Pass("embed", target, identity, EmbedWorker, arguments, pool, ahead=ahead).run(items, done=done)
        elif items:
            arguments = {"config": config, "generation": generation}
            pool = Pool(1, config.embed.cpus_per_worker)
            trial = Pass("embed: trial", None, identity, TrialWorker, arguments, pool).run([_all_in_one(items)])
    embedded = [details_of(receipt, EmbeddedUnit) for receipt in receipts]
    described = embedded or [details_of(receipt, EmbeddedUnit) for receipt in trial]
    shares = unknown_shares([unit["unknown"] for unit in described])
    warn_of_unknown(config.embed.model, shares)
    dimensions = details_of(base, EmbeddingsDetails)["dimensions"] if base else None
    return target.commit(
        identity,
        receipts,
        config=config.embed.model_dump(mode="json"),
        inputs={"corpus": corpus.fingerprint},
        seconds=watch.seconds,
        details=EmbeddingsDetails(
            model=model,
            persisted=config.embed.persist,
            dimensions=described[0]["dimensions"] if described else dimensions,
            rows=sum(receipt.counts.written for receipt in receipts),
            tokens=sum(unit["tokens"] for unit in embedded),
            unknown_share=shares,
            seconds={
                step: round(sum(unit["seconds"][step] for unit in embedded), 1)
                for step in ("prepare", "encode", "write")
            },
        ),
    )


def planned_fingerprint(config: RunConfig, corpus: Manifest) -> str:
    """Return the fingerprint of the first generation's embeddings if they are made as `config` says."""
    if _has_vectors(corpus, 0):
        return _import_identity(corpus.fingerprint)
    return _identity(config, _model_identity(config), corpus.fingerprint)


def is_embedded(config: RunConfig, generation: int) -> bool:
    """Return whether a generation's vectors are `embed.model`'s, of this or an earlier version of the corpus."""
    workspace = Workspace(config)
    corpus, made = workspace.corpus.require(), workspace.embeddings(generation).manifest()
    identity_of = partial(_identity, config, _model_identity(config))
    return made is not None and made.fingerprint in map(identity_of, corpus.lineage)


def embedding_pool(settings: EmbedConfig) -> Pool:
    """Return the workers of the stage `embed`, and of every pass that embeds rows itself.

    Ray shows a worker only the GPUs that it asked for: one that asked for none could not embed on one.
    """
    gpus = gpus_for(settings.device, settings.workers, settings.gpus_per_worker)
    return Pool(settings.workers, settings.cpus_per_worker, gpus)


def unknown_shares(counts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """Return the share of unknown tokens by source, from [unknown tokens, tokens] of many row groups."""
    total: dict[str, np.ndarray] = {}
    for of_source in counts:
        for source, pair in of_source.items():
            total[source] = total.get(source, np.zeros(2, np.int64)) + np.asarray(pair)
    return {source: round(float(unknown / max(tokens, 1)), 5) for source, (unknown, tokens) in sorted(total.items())}


def warn_of_unknown(model: str, shares: Mapping[str, float]) -> None:
    """Warn of each source in which more than 2 % of the tokens are unknown to the model."""
    for source, share in shares.items():
        if share > _UNKNOWN_LIMIT:
            say(
                f"embed: {100 * share:.1f} % of the tokens of source {source} are unknown to {model}: clusters and "
                "masks made with it mean little there (take a model of that language, or embed.model=char-ngrams)",
                level="warning",
                source=source,
                share=share,
            )


def _import_vectors(
    config: RunConfig, corpus: Artifact, manifest: Manifest, artifact: GrowingArtifact, force: bool
) -> Manifest:
    """Make embeddings of the vectors that came with the corpus; return their manifest."""
    identity = _import_identity(manifest.fingerprint)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    corpus.check_parts(manifest)
    watch = Stopwatch()
    _, target, items = _continued(artifact, _import_identity, manifest, force)
    done = target.begin(identity, force)
    dimensions = details_of(manifest, CorpusDetails)["dimensions"]
    arguments = {"corpus": corpus, "dimensions": dimensions}
    with ray_session(config.ray):
        copying = Pass("embed: import", target, identity, ImportWorker, arguments, Pool(config.embed.workers))
        receipts = copying.run(items, done=done)
    return target.commit(
        identity,
        receipts,
        config={},
        inputs={"corpus": manifest.fingerprint},
        seconds=watch.seconds,
        details=EmbeddingsDetails(model=_IMPORTED, persisted=True, dimensions=dimensions, tokens=0, unknown_share={}),
    )


def _continued(
    artifact: GrowingArtifact, identity_of: Callable[[str], str], corpus: Manifest, force: bool
) -> tuple[Manifest | None, Artifact, list[WorkItem]]:
    """Return embeddings of an earlier version of the corpus, if any, where to write, and the row groups to do."""
    base = None if force else made_before(artifact, identity_of, corpus)
    target = artifact.next_version(base) if base else artifact
    groups = row_groups_of(corpus)[len(base.parts) if base else 0 :]
    return base, target, [WorkItem(group.number, group.rows, group) for group in groups]


def _has_vectors(corpus: Manifest, generation: int) -> bool:
    # A later generation is embedded by a model, whatever the first one's vectors were.
    return given_dimensions(corpus) is not None and generation == 0


def _model_identity(config: RunConfig) -> str:
    name = config.embed.model
    return name if name in SURROGATES else model_fingerprint(resolve_model(name, config.storage))


def _identity(config: RunConfig, model: str, corpus: str) -> str:
    return fingerprint("embeddings", config.embed, model, corpus)


def _import_identity(corpus: str) -> str:
    return fingerprint("embeddings", _IMPORTED, corpus)


def _fit_surrogate(
    config: RunConfig, corpus: Artifact, artifact: Artifact, identity: str, items: Sequence[WorkItem]
) -> None:
    arguments = {"name": config.embed.model, "corpus": corpus, "max_tokens": config.embed.max_tokens}
    pool = Pool(1, config.embed.cpus_per_worker)
    fit = Pass("surrogate", artifact, identity, FitSurrogateWorker, arguments, pool)
    fit.commit([_all_in_one(items)], force=True)


def _all_in_one(items: Sequence[WorkItem]) -> WorkItem:
    """Return one item of all row groups, for workers that read a sample of the corpus."""
    rows = sum(item.rows for item in items)
    return WorkItem(0, min(rows, SAMPLE_PAIRS), [item.payload for item in items])


def _placement(config: RunConfig, corpus: Artifact) -> tuple[str, Pool, Ahead | None]:
    """Return the device of the workers, the pool they run in, and the pool that tokenises ahead of them."""
    settings = config.embed
    device, pool = device_for(settings.device), embedding_pool(settings)
    tokenizers = settings.tokenizers or 0
    if settings.tokenizers is None and pool.gpus:
        left = int((current_executor().resources().get("CPU", 0) - pool.workers * pool.cpus) / Pool.cpus)
        tokenizers = min(_TOKENIZERS_PER_GPU_WORKER * pool.workers, max(left, 0))
    arguments = {"corpus": corpus, "config": config}
    return device, pool, Ahead(PrepareWorker, arguments, Pool(tokenizers)) if tokenizers else None
