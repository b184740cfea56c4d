"""The stage `cluster`: sample, fit, assign and shuffle, write shards, commit.

Each pass leaves an artifact of its own under `<clusters>/_exchange` and is skipped when that is whole; so a crash costs
the units that were under way. They are removed once the clusters are committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clusterbatch.clustering.assigning import AssignWorker, Tokenisation
from clusterbatch.clustering.buckets import BucketPlan, plan_buckets
from clusterbatch.clustering.fitting import Centroids, FitWorker, read_centroids
from clusterbatch.clustering.groups import Groups, groups_of, mean_size
from clusterbatch.clustering.reducing import ReduceWorker
from clusterbatch.clustering.sampling import SampleWorker, sample_thresholds
from clusterbatch.clustering.shards import INDEX, ShardLayout, index_table
from clusterbatch.clustering.tasks import tasks
from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.errors import DataError
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.store import Artifact, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.tables import parquet_columns, write_parquet
from clusterbatch.store.workspace import Workspace

_EXCHANGE = "_exchange"


def cluster(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Clusters the embedded corpus of `config.workspace` and writes its shards; at once when that is done already."""
    workspace = Workspace(config)
    inputs = (workspace.corpus.require(), workspace.embeddings(generation).require())
    tokenisation = Tokenisation(
        model=config.train.model,
        storage=config.storage,
        special_tokens=config.train.encoder == "backbone",
        max_query_tokens=config.train.max_query_tokens,
        max_document_tokens=config.train.max_document_tokens,
        prompts=config.train.named_prompts,
    )
    identity = _fingerprint(config, inputs, tokenisation)
    artifact = workspace.clusters(generation)
    if artifact.is_done(identity) and not force:
        manifest = artifact.require()
        artifact.folder.remove(_EXCHANGE)
        return manifest
    with ray_session(config.ray):
        return _Passes(config, workspace, generation, inputs, tokenisation, identity).run(force)


def _fingerprint(config: RunConfig, inputs: tuple[Manifest, Manifest], tokenisation: Tokenisation) -> str:
    stratify = config.batches.stratify
    return fingerprint(
        "clusters",
        config.cluster,
        stratify,
        mean_size(config) if config.cluster.clusters is None and stratify not in ("random", "source") else None,
        [tokenisation.tokenizer.fingerprint, tokenisation.max_query_tokens, tokenisation.max_document_tokens],
        tokenisation.prompts,
        [manifest.fingerprint for manifest in inputs],
    )


@dataclass
class _Passes:
    """The passes of one call, in order."""

    config: RunConfig
    workspace: Workspace
    generation: int
    inputs: tuple[Manifest, Manifest]
    tokenisation: Tokenisation
    identity: str

    def run(self, force: bool) -> Manifest:
        watch = Stopwatch()
        corpus, embeddings = self.inputs
        self.clusters = self.workspace.clusters(self.generation)
        self.pool = Pool(self.config.cluster.workers)
        done = self.clusters.begin(self.identity, force)
        groups = groups_of(self.config, corpus)
        units = tasks(corpus, embeddings)
        fitted = self.fit(groups, self.sample(groups, units, force), force)
        centroids = read_centroids(self._pass("fit"), fitted.parts, groups)
        plan = plan_buckets(self.estimated_bytes(groups, centroids), self.config.cluster.shard_bytes)
        exchange = self.assign(groups, units, centroids, plan, force)
        receipts = self.reduce(groups, plan, exchange, done)
        manifest = self.commit(groups, fitted, receipts, watch)
        self.clusters.folder.remove(_EXCHANGE)
        return manifest

    def sample(self, groups: Groups, units: list[Unit], force: bool) -> Manifest:
        thresholds = sample_thresholds(groups, self.config.cluster.sample_per_centroid)
        if not thresholds.any():
            units = []
        arguments = {
            "corpus": self.workspace.corpus,
            "embeddings": self.workspace.embeddings(self.generation),
            "groups": groups,
            "thresholds": thresholds,
            "features": self.config.cluster.features,
            "seed": self.config.cluster.seed,
        }
        return self._run("sample", units, SampleWorker, arguments, force)

    def fit(self, groups: Groups, sample: Manifest, force: bool) -> Manifest:
        split = np.flatnonzero(groups.clusters > 1)
        wanted = np.minimum(groups.rows, groups.clusters * self.config.cluster.sample_per_centroid)
        # The largest first: then the small ones fill the gaps at the end.
        order = split[np.argsort(-wanted[split], kind="stable")]
        units = [Unit(int(group), int(wanted[group]), None) for group in order]
        arguments = {
            "sample": self._pass("sample"),
            "sample_parts": sample.parts,
            "groups": groups,
            "config": self.config.cluster,
        }
        return self._run("fit", units, FitWorker, arguments, force)

    def assign(
        self, groups: Groups, units: list[Unit], centroids: list[Centroids], plan: BucketPlan, force: bool
    ) -> Manifest:
        arguments = {
            "corpus": self.workspace.corpus,
            "embeddings": self.workspace.embeddings(self.generation),
            "groups": groups,
            "centroids": centroids,
            "plan": plan,
            "tokenisation": self.tokenisation,
            "features": self.config.cluster.features,
            "seed": self.config.cluster.seed,
        }
        return self._run("assign", units, AssignWorker, arguments, force)

    def reduce(self, groups: Groups, plan: BucketPlan, exchange: Manifest, done: dict[int, Receipt]) -> list[Receipt]:
        rows = np.sum([part.details["bucket_rows"] for part in exchange.parts], axis=0)
        units = [Unit(bucket, int(rows[bucket]), None) for bucket in range(plan.buckets) if rows[bucket]]
        arguments = {
            "exchange": self._pass("assign"),
            "exchange_parts": exchange.parts,
            "clusters": self.clusters,
            "fingerprint": self.identity,
            "groups": groups,
            "layout": self.layout,
            "shard_bytes": self.config.cluster.shard_bytes,
        }
        return run_units("shards", units, ReduceWorker, arguments, self.pool, done=done)

    def commit(self, groups: Groups, fitted: Manifest, receipts: list[Receipt], watch: Stopwatch) -> Manifest:
        corpus = self.inputs[0]
        pieces = _number_shards(receipts)
        written = sum(piece["rows"] for piece in pieces)
        if written != corpus.counts.written:
            raise DataError(f"clusters: {written} rows in shards, {corpus.counts.written} in the corpus")
        index = write_parquet(self.clusters, "index", index_table(pieces), content=INDEX)
        return self.clusters.commit(
            self.identity,
            receipts,
            config={"cluster": self.config.cluster.identity(), "stratify": self.config.batches.stratify},
            inputs={"corpus": corpus.fingerprint, "embeddings": self.inputs[1].fingerprint},
            seconds=watch.seconds,
            details={
                "layout": asdict(self.layout),
                "shards": len({piece["shard"] for piece in pieces}),
                "clusters": {name: int(number) for name, number in zip(groups.names, groups.clusters, strict=True)},
                "mean_cosine": {part.details["group"]: part.details["mean_cosine"] for part in fitted.parts},
            },
            extra_parts=[*self._keep(fitted.parts), index],
        )

    @property
    def layout(self) -> ShardLayout:
        columns = parquet_columns(self.workspace.corpus.folder, self.inputs[0].parts[0].path)
        return ShardLayout(
            vocabulary=self.tokenisation.tokenizer.vocabulary,
            run_rows=self.config.cluster.run_rows,
            surrogate_dimensions=self.inputs[1].details["dimensions"],
            negatives="negatives" in columns,
            weight="weight" in columns,
        )

    def estimated_bytes(self, groups: Groups, centroids: list[Centroids]) -> np.ndarray:
        """Of every cluster's tokens and vectors, from the sample's shares and the corpus' bytes on storage."""
        corpus = self.inputs[0]
        # Compressed text has about a third of its characters' bytes; a token is about four characters and two bytes.
        tokens = 1.5 * sum(part.bytes for part in corpus.parts) / max(1, corpus.counts.written)
        longest = 2 * (self.config.train.max_query_tokens + self.config.train.max_document_tokens)
        each = min(tokens, longest) + 4 * (self.layout.surrogate_dimensions or 0)
        shares = [rows * found.share for rows, found in zip(groups.rows, centroids, strict=True)]
        return np.concatenate(shares) * each

    def _pass(self, name: str) -> Artifact:
        return Artifact(self.clusters.folder.child(_EXCHANGE, name), f"clustering pass {name}")

    def _run(self, name: str, units: list[Unit], worker: type, arguments: dict[str, Any], force: bool) -> Manifest:
        """One pass, committed; at once when it is whole already."""
        artifact, watch = self._pass(name), Stopwatch()
        if artifact.is_done(self.identity):
            return artifact.require()
        done = artifact.begin(self.identity, force)
        arguments = {**arguments, "output": artifact, "fingerprint": self.identity}
        receipts = run_units(name, units, worker, arguments, self.pool, done=done) if units else []
        return artifact.commit(self.identity, receipts, config={}, inputs={}, seconds=watch.seconds)

    def _keep(self, parts: Sequence[Part]) -> list[Part]:
        """Copies parts of a pass into the clusters artifact itself."""
        source = self._pass("fit")
        return [
            self.clusters.write_part(
                part.path.rsplit("-", 1)[0], "parquet", source.read_part(part), part.rows, **part.details
            )
            for part in parts
        ]


def _number_shards(receipts: list[Receipt]) -> list[dict[str, Any]]:
    """Numbers shards through all buckets, on the receipts' parts and in the pieces, which are returned in order.

    Pieces of one cluster are numbered in their order, which is that of their hashes.
    """
    pieces: list[dict[str, Any]] = []
    first, piece_number = 0, 0
    previous: tuple[str, int] | None = None
    for receipt in sorted(receipts, key=lambda receipt: receipt.unit):
        for part in receipt.parts:
            part.details["shard"] += first
        for piece in receipt.details["pieces"]:
            key = (piece["source"], piece["cluster"])
            piece_number = piece_number + 1 if key == previous else 0
            previous = key
            pieces.append({**piece, "shard": piece["shard"] + first, "piece": piece_number})
        first += 1 + max(piece["shard"] for piece in receipt.details["pieces"])
    return pieces
