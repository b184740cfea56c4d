"""The stage `cluster`: fit, assign and shuffle, write shards, commit.

Its passes are artifacts of their own under `<clusters>/_exchange`. A pass that is whole is not repeated, so a crash
costs the work items that were under way. All passes are removed once the clusters are committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, cast

from clusterbatch.clustering.cells import grouping_of, mean_size
from clusterbatch.clustering.communities import require_partitioner
from clusterbatch.clustering.communities_fit import fit_communities
from clusterbatch.clustering.embedded_corpus import EmbeddedCorpus, PassFactory
from clusterbatch.clustering.fit import fit_kmeans
from clusterbatch.clustering.model import FittedClusters, StoredParts
from clusterbatch.clustering.user_groups import fit_user_groups
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.encoder.limits import check_limits, training_limits
from clusterbatch.errors import DataError, OtherWorkError, UsageError
from clusterbatch.log import say
from clusterbatch.runtime import current_executor, ray_session
from clusterbatch.search.mine import Mined, mine
from clusterbatch.shards.passes import ShardPasses
from clusterbatch.shards.reader import INDEX, index_table
from clusterbatch.shards.semantic_duplicates import DUPLICATES, lowest_examples
from clusterbatch.shards.statistics import StatisticsJob
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.artifact import EXCHANGE
from clusterbatch.store.details import ClustersDetails, ReducedBucket, SemanticDuplicates, ShardLayout, details_of
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
    """Cluster the embedded corpus of `config.workspace` and write its shards; return at once if that is done.

    previous: the generation whose clusters these continue; vectors: the generation whose embeddings are clustered
    (None: this one). If `mine` is on, that is done before.

    Raises UsageError if the embeddings are not of the corpus as it is now, METIS is needed and not installed, or a
    prompt leaves no room for text in training.
    """
    if config.cluster.method == "communities":
        require_partitioner()
    if config.cluster.duplicates.threshold is not None and grouping_of(config) in ("source", "random"):
        raise UsageError(
            f"cluster.duplicates are those of a cluster, and batches.stratify: {config.batches.stratify} makes none"
        )
    workspace, vectors = Workspace(config), generation if vectors is None else vectors
    corpus, embeddings = workspace.corpus.require(), workspace.embeddings(vectors).require()
    if embeddings.inputs.get("corpus") in corpus.earlier:
        raise UsageError(
            f"cluster: the corpus is at version {corpus.version}, its embeddings are of an earlier one; embed"
        )
    check_limits(config.train.model, config.storage, training_limits(config), config.train.encoder)
    mined = None
    if config.mine.is_on:
        mine(config, generation=generation, force=force, embedded=vectors)
        mined = Mined.of(config, generation)
    identity = _identity(config, corpus.fingerprint, embeddings.fingerprint, previous, mined)
    artifact = workspace.clusters(generation)
    if artifact.is_done(identity) and not force:
        # Left by a crash between the commit and the removal.
        if not artifact.reused:
            artifact.remove(EXCHANGE)
        return artifact.require()
    manifest = artifact.manifest()
    if manifest is not None and manifest.inputs.get("corpus") in corpus.earlier and not force and not artifact.reused:
        raise OtherWorkError(
            f"{artifact.folder.uri}: clusters of an earlier version of the corpus, which are kept; "
            "`clusterbatch refresh` makes the next generation of the corpus as it is now, or pass --force"
        )
    workspace.corpus.check_parts(corpus)
    workspace.embeddings(vectors).check_parts(embeddings)
    watch = Stopwatch()
    done = artifact.begin(identity, force)
    for sentence in Tokenisation.of(config).too_long:
        say(sentence, level="warning")
    embedded = EmbeddedCorpus(config, vectors, corpus, embeddings, previous)
    passes = PassFactory(artifact.folder.child(EXCHANGE), identity, embedded.items)
    with ray_session(config.ray):
        clusters = _fit(embedded, passes)
        shards = ShardPasses(embedded, passes, mined)
        plan = shards.plan(clusters.shares())
        receipts = shards.reduce(plan, shards.map(clusters, plan), artifact, done)
        manifest = _commit(artifact, shards, clusters, receipts, watch)
    artifact.remove(EXCHANGE)
    return manifest


def _fit(corpus: EmbeddedCorpus, passes: PassFactory) -> FittedClusters:
    if grouping_of(corpus.config) == "group":
        return fit_user_groups(corpus, passes)
    if corpus.config.cluster.method == "communities":
        return fit_communities(corpus, passes)
    return fit_kmeans(corpus, passes)


def planned_fingerprint(config: RunConfig, corpus: str, embeddings: str) -> str | None:
    """Return the fingerprint of the first generation's clusters if they are made as `config` says.

    corpus, embeddings: fingerprints of what is clustered. None if it depends on mining, which has not finished.
    """
    if config.mine.is_on and Workspace(config).mined().manifest() is None:
        return None
    return _identity(config, corpus, embeddings, None, Mined.of(config, 0) if config.mine.is_on else None)


def _identity(config: RunConfig, corpus: str, embeddings: str, previous: Previous | None, mined: Mined | None) -> str:
    grouping, tokenisation = grouping_of(config), Tokenisation.of(config)
    more: list[list[object]] = []
    if previous:
        more.append([previous.fingerprint, previous.keep, *(["frozen"] if previous.frozen else [])])
    more += [["mined", mined.fingerprint]] if mined else []
    more += [["prompts", tokenisation.prompts]] if tokenisation.prompts else []
    return fingerprint(
        "clusters",
        config.cluster,
        grouping,
        mean_size(config) if grouping == "cluster" and config.cluster.clusters is None else None,
        [tokenisation.tokenizer.fingerprint, tokenisation.max_query_tokens, tokenisation.max_document_tokens],
        [corpus, embeddings],
        *more,
    )


def _commit(
    artifact: Artifact, shards: ShardPasses, clusters: FittedClusters, receipts: list[Receipt], watch: Stopwatch
) -> Manifest:
    embedded, config = shards.corpus, shards.corpus.config
    shard_receipts = [receipt for receipt in receipts if "pieces" in receipt.details]
    pieces = number_pieces(shard_receipts)
    total = sum(receipt.counts.read for receipt in receipts)
    if total != embedded.corpus.counts.written:
        raise DataError(
            f"{artifact.folder.uri}: {total} rows reached the shards, the corpus has {embedded.corpus.counts.written}"
        )
    statistics = StatisticsJob(
        artifact=shards.facts,
        facts=[Part(**details_of(receipt, ReducedBucket)["facts"]) for receipt in shard_receipts],
        keys=[[(piece["source"], piece["cluster"]) for piece in of_bucket] for of_bucket in pieces],
        output=artifact,
    )
    # In a worker: what it holds is not in the driver's memory.
    parts, summary = current_executor().call(StatisticsJob.run, statistics, embedded.pool)
    flat = [piece for of_bucket in pieces for piece in of_bucket]
    details = ClustersDetails(
        layout=cast(ShardLayout, asdict(shards.schema)),
        tokens=Tokenisation.of(config).identity,
        # The generation whose embeddings these clusters are of.
        vectors=embedded.generation,
        shards=1 + flat[-1]["shard"] if flat else 0,
        sources=summary,
        fit=clusters.describe(),
        surrogate_cosine_error=_surrogate_error(shard_receipts),
    )
    if config.cluster.duplicates.threshold is not None:
        found = [details_of(receipt, ReducedBucket) for receipt in shard_receipts]
        details["duplicates"] = _sum_by_source(of_bucket["duplicates"] for of_bucket in found)
        examples = lowest_examples(example for of_bucket in found for example in of_bucket["duplicate_examples"])
        parts.append(write_parquet(artifact, DUPLICATES, examples, content=DUPLICATES))
    return artifact.commit(
        shards.passes.identity,
        receipts,
        config={**config.cluster.identity(), "stratify": grouping_of(config)},
        inputs={"corpus": embedded.corpus.fingerprint, "embeddings": embedded.embeddings.fingerprint},
        seconds=watch.seconds,
        passes_seconds=_worker_seconds(shards.passes),
        details=details,
        extra_parts=[
            *_keep(artifact, clusters.stored),
            *parts,
            write_parquet(artifact, INDEX, index_table(flat), content=INDEX),
        ],
    )


def _worker_seconds(passes: PassFactory) -> float:
    """Return the seconds of all passes, which are removed once the clusters are committed."""
    manifests = [passes.artifact(name).manifest() for name in passes.folder.list()]
    return sum(manifest.worker_seconds or 0.0 for manifest in manifests if manifest is not None)


def number_pieces(receipts: Sequence[Receipt]) -> list[list[dict[str, Any]]]:
    """Number shards through all buckets and clusters through each source, in packing order; return index entries.

    Also sets the shard on the receipts' parts. Pieces of one cluster are numbered in the order of their hashes.
    """
    entries: list[list[dict[str, Any]]] = []
    first_shard = piece_number = cluster = 0
    previous: tuple[str, int, int] | None = None
    for receipt in sorted(receipts, key=lambda receipt: receipt.unit):
        of_bucket = []
        for piece in details_of(receipt, ReducedBucket)["pieces"]:
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
            # Rows that were dropped are in no shard.
            if "shard" in part.details:
                part.details["shard"] += first_shard
        first_shard = 1 + of_bucket[-1]["shard"]
    return entries


def _sum_by_source(found: Iterable[dict[str, SemanticDuplicates]]) -> dict[str, SemanticDuplicates]:
    total: dict[str, SemanticDuplicates] = {}
    for of_bucket in found:
        for source, counts in of_bucket.items():
            before = total.get(source, SemanticDuplicates(groups=0, rows=0, pairs=0, dropped=0))
            total[source] = cast(SemanticDuplicates, {key: before[key] + counts[key] for key in counts})  # type: ignore[literal-required]
    return dict(sorted(total.items()))


def _surrogate_error(receipts: Sequence[Receipt]) -> float | None:
    """Return the root mean square error of the stored vectors' cosines; None if no vectors are stored."""
    errors = [details_of(receipt, ReducedBucket)["surrogate_errors"] for receipt in receipts]
    squares, count = sum(of_bucket for of_bucket, _ in errors), sum(rows for _, rows in errors)
    return round((squares / count) ** 0.5, 6) if count else None


def _keep(artifact: Artifact, fits: Sequence[StoredParts]) -> list[Part]:
    """Copy the parts of the fits to the clusters artifact itself."""
    kept = []
    for fit in fits:
        for part in fit.parts:
            stem = f"level{part.details.get('level', 1)}-{part.path.rsplit('-', 1)[0]}"
            data = fit.artifact.read_part(part)
            kept.append(artifact.write_part(stem, "parquet", data, part.rows, **part.details))
    return kept
