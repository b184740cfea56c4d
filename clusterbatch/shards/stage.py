"""The stage `cluster`: sample, fit, assign and shuffle, write shards, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from clusterbatch.clustering.communities import require_partitioner
from clusterbatch.clustering.partitions import layout_of, mean_size
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.errors import DataError, OtherWorkError, UsageError
from clusterbatch.log import say
from clusterbatch.runtime import ray_session
from clusterbatch.search.mine import Mined, mine
from clusterbatch.shards.passes import EXCHANGE, Passes, run_on_worker
from clusterbatch.shards.reader import INDEX, index_table
from clusterbatch.shards.statistics import StatisticsJob
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace


def cluster(
    config: RunConfig,
    *,
    generation: int = 0,
    force: bool = False,
    previous: Previous | None = None,
    vectors: int | None = None,
) -> Manifest:
    """Clusters the embedded corpus of `config.workspace` and writes its shards; at once when that is done already.

    previous: the generation whose clusters these go on from; vectors: the generation whose embeddings are clustered
    (unset: this one's). Where `mine` is on, that is done before.

    Raises UsageError where the embeddings are not of the corpus as it is now, or METIS is wanted and not there.
    """
    if config.cluster.method == "communities":
        require_partitioner()
    workspace, vectors = Workspace(config), generation if vectors is None else vectors
    corpus, embeddings = workspace.corpus.require(), workspace.embeddings(vectors).require()
    if embeddings.inputs.get("corpus") in corpus.earlier:
        raise UsageError(
            f"cluster: the corpus is at version {corpus.version}, its embeddings are of an earlier one; embed"
        )
    mined = None
    if config.mine.is_on:
        mine(config, generation=generation, force=force, embedded=vectors)
        mined = Mined.of(config, generation)
    identity = _identity(config, corpus, embeddings, previous, mined)
    artifact = workspace.clusters(generation)
    if artifact.is_done(identity) and not force:
        # What a crash between the commit and the removal has left.
        if not artifact.reused:
            artifact.folder.remove(EXCHANGE)
        return artifact.require()
    made = artifact.manifest()
    if made is not None and made.inputs.get("corpus") in corpus.earlier and not force and not artifact.reused:
        raise OtherWorkError(
            f"{artifact.folder.uri}: clusters of an earlier version of the corpus, and they stay as they are; "
            "`clusterbatch refresh` makes the next generation of the corpus as it is now, or pass --force"
        )
    watch = Stopwatch()
    done = artifact.begin(identity, force)
    for sentence in Tokenisation.of(config).too_long:
        say(sentence, level="warning")
    with ray_session(config.ray):
        passes = Passes(config, generation, vectors, corpus, embeddings, identity, force, previous, mined)
        fits = passes.fits()
        plan = passes.plan(fits)
        receipts = passes.reduce(plan, passes.assign(fits, plan), done)
        manifest = _commit(passes, fits.parts, receipts, watch)
    artifact.folder.remove(EXCHANGE)
    return manifest


def _identity(
    config: RunConfig, corpus: Manifest, embeddings: Manifest, previous: Previous | None, mined: Mined | None
) -> str:
    layout, tokenisation = layout_of(config), Tokenisation.of(config)
    more: list[list[object]] = []
    if previous:
        more.append([previous.fingerprint, previous.keep, *(["frozen"] if previous.frozen else [])])
    more += [["mined", mined.fingerprint]] if mined else []
    more += [["prompts", tokenisation.prompts]] if tokenisation.prompts else []
    return fingerprint(
        "clusters",
        config.cluster,
        layout,
        mean_size(config) if layout == "cluster" and config.cluster.clusters is None else None,
        [tokenisation.tokenizer.fingerprint, tokenisation.max_query_tokens, tokenisation.max_document_tokens],
        [corpus.fingerprint, embeddings.fingerprint],
        *more,
    )


def _commit(
    passes: Passes, fitted: Sequence[tuple[Artifact, Part]], receipts: list[Receipt], watch: Stopwatch
) -> Manifest:
    artifact, corpus = passes.clusters, passes.corpus
    shard_receipts = [receipt for receipt in receipts if "pieces" in receipt.details]
    pieces = number_pieces(shard_receipts)
    total = sum(receipt.counts.read for receipt in receipts)
    if total != corpus.counts.written:
        raise DataError(
            f"{artifact.folder.uri}: {total} rows reached the shards, the corpus has {corpus.counts.written}"
        )
    statistics = StatisticsJob(
        artifact=passes.artifact("facts"),
        facts=[Part(**receipt.details["facts"]) for receipt in shard_receipts],
        keys=[[(piece["source"], piece["cluster"]) for piece in of_bucket] for of_bucket in pieces],
        output=artifact,
    )
    parts, summary = run_on_worker(StatisticsJob.run, statistics, passes.pool)
    flat = [piece for of_bucket in pieces for piece in of_bucket]
    return artifact.commit(
        passes.identity,
        receipts,
        config={**passes.config.cluster.identity(), "stratify": layout_of(passes.config)},
        inputs={"corpus": corpus.fingerprint, "embeddings": passes.embeddings.fingerprint},
        seconds=watch.seconds,
        passes_seconds=_worker_seconds(passes),
        details={
            "layout": asdict(passes.layout),
            "tokens": Tokenisation.of(passes.config).identity,
            # The generation whose embeddings these clusters are of.
            "vectors": passes.vectors,
            "shards": 1 + flat[-1]["shard"] if flat else 0,
            "sources": summary,
            "fit": _fit_summary(fitted),
            "surrogate_cosine_error": _surrogate_error(shard_receipts),
        },
        extra_parts=[
            *_keep(artifact, fitted),
            *parts,
            write_parquet(artifact, INDEX, index_table(flat), content=INDEX),
        ],
    )


def _worker_seconds(passes: Passes) -> float:
    """Of all passes, which are removed once the clusters are committed."""
    made = [passes.artifact(name).manifest() for name in passes.clusters.folder.list(EXCHANGE)]
    return sum(manifest.worker_seconds or 0.0 for manifest in made if manifest is not None)


def number_pieces(receipts: Sequence[Receipt]) -> list[list[dict[str, Any]]]:
    """Numbers shards through all buckets and clusters through each source, in packing order; returns index entries.

    Sets the shard on the receipts' parts, too. Pieces of one cluster are numbered in the order of their hashes.
    """
    entries: list[list[dict[str, Any]]] = []
    first_shard = piece_number = cluster = 0
    previous: tuple[str, int, int] | None = None
    for receipt in sorted(receipts, key=lambda receipt: receipt.unit):
        of_bucket = []
        for piece in receipt.details["pieces"]:
            key = (piece["source"], piece["centroid"], piece["part"])
            piece_number = piece_number + 1 if key == previous else 0
            if previous is None or piece["source"] != previous[0]:
                cluster = 0
            elif key != previous:
                cluster += 1
            previous = key
            entry = {**piece, "cluster": cluster, "piece": piece_number, "shard": piece["shard"] + first_shard}
            of_bucket.append(entry)
        entries.append(of_bucket)
        for part in receipt.parts:
            part.details["shard"] += first_shard
        first_shard = 1 + of_bucket[-1]["shard"]
    return entries


def _fit_summary(fitted: Sequence[tuple[Artifact, Part]]) -> dict[str, Any]:
    """By group: centroids, mean cosine of the fit's sample, most rounds of a fit; of two levels those of the finer."""
    parts = [part for _, part in fitted if "mean_cosine" in part.details]
    finest: dict[str, int] = {}
    for part in parts:
        finest[part.details["group"]] = max(finest.get(part.details["group"], 1), part.details.get("level", 1))
    summary = {}
    for group, level in finest.items():
        chosen = [p for p in parts if p.details["group"] == group and p.details.get("level", 1) == level]
        centroids = sum(part.rows for part in chosen)
        summary[group] = {
            "centroids": centroids,
            "mean_cosine": round(sum(part.rows * part.details["mean_cosine"] for part in chosen) / centroids, 5),
            "rounds": max(part.details.get("rounds", 1) for part in chosen),
        }
    return summary


def _surrogate_error(receipts: Sequence[Receipt]) -> float | None:
    """Root mean square error of the stored vectors' cosines; None where no vectors are stored."""
    squares, count = (sum(receipt.details["surrogate_errors"][i] for receipt in receipts) for i in (0, 1))
    return round((squares / count) ** 0.5, 6) if count else None


def _keep(artifact: Artifact, fitted: Sequence[tuple[Artifact, Part]]) -> list[Part]:
    """Copies of the fits' parts in the clusters artifact itself."""
    kept = []
    for made, part in fitted:
        stem = f"level{part.details.get('level', 1)}-{part.path.rsplit('-', 1)[0]}"
        kept.append(artifact.write_part(stem, "parquet", made.read_part(part), part.rows, **part.details))
    return kept
