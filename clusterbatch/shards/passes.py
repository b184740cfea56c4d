"""The passes of the stage `cluster`, each an artifact of its own under `<clusters>/_exchange`.

A pass that is whole is not done again; so a crash costs the units that were under way. All passes are removed once the
clusters are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from clusterbatch.clustering import fit_distributed as distributed
from clusterbatch.clustering.communities_fit import fit_communities
from clusterbatch.clustering.fit import FitJob, FitWorker
from clusterbatch.clustering.model import GroupModel, StoredModels
from clusterbatch.clustering.partitions import Cells, coarse_clusters, first_level, groups_of, layout_of, second_level
from clusterbatch.clustering.sample import SampleChunks, SampleWorker
from clusterbatch.clustering.user_groups import LABEL, LabelFitWorker, LabelSumsWorker
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.stage import embedding_pool
from clusterbatch.embedding.vectors import tasks
from clusterbatch.errors import DataError, UsageError
from clusterbatch.runtime import Pool, Unit, current_executor, run_units
from clusterbatch.runtime.resources import device_for, gpus_for
from clusterbatch.schema import VECTORS
from clusterbatch.search.mine import Mined
from clusterbatch.shards.bucket_plan import BucketPlan, plan_buckets
from clusterbatch.shards.layout import ShardLayout
from clusterbatch.shards.map import AssignWorker
from clusterbatch.shards.reduce import ReduceJob, ReduceWorker
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Manifest, Receipt, Stopwatch
from clusterbatch.store.shuffle import bucket_rows
from clusterbatch.store.tables import parquet_columns
from clusterbatch.store.traffic import carry_over
from clusterbatch.store.workspace import Workspace

EXCHANGE = "_exchange"
# Text that a bucket has at most, about: sorting holds it twice.
_BUCKET_TEXT = 2**30
# Of text to its compressed bytes, at most; usually it is three. Images as text have a third more bytes than as files.
_EXPANSION, _IMAGE_EXPANSION = 4.0, 4 / 3


@dataclass
class Passes:
    """One call's passes, in their order: fits, plan, assign, reduce."""

    config: RunConfig
    generation: int
    # The generation whose embeddings are clustered.
    vectors: int
    corpus: Manifest
    embeddings: Manifest
    identity: str
    force: bool
    previous: Previous | None = None
    mined: Mined | None = None

    @cached_property
    def workspace(self) -> Workspace:
        return Workspace(self.config)

    @cached_property
    def clusters(self) -> Artifact:
        return self.workspace.clusters(self.generation)

    @cached_property
    def groups(self) -> Groups:
        groups = groups_of(self.config, self.corpus)
        clusters = groups.clusters.copy()
        for group, model in self.held.items():
            clusters[group] = len(model.shares)
        return replace(groups, clusters=clusters)

    @cached_property
    def held(self) -> dict[int, GroupModel]:
        """The models of the groups whose clusters go on from the generation before."""
        return self.previous.held(groups_of(self.config, self.corpus)) if self.previous else {}

    @cached_property
    def units(self) -> list[Unit]:
        return tasks(self.corpus, self.embeddings)

    @cached_property
    def columns(self) -> list[str]:
        """Of the corpus."""
        units = row_groups_of(self.corpus)
        if not units:
            raise DataError(f"{self.workspace.corpus.folder.uri}: the corpus has no rows")
        return parquet_columns(self.workspace.corpus.folder, units[0].path)

    @cached_property
    def device(self) -> str:
        return device_for(self.config.cluster.device)

    @cached_property
    def pool(self) -> Pool:
        return Pool(self.config.cluster.workers, self.config.cluster.cpus_per_worker)

    @cached_property
    def computing_pool(self) -> Pool:
        """For passes that multiply matrices."""
        gpus = gpus_for(self.device, self.pool.workers, self.config.cluster.gpus_per_worker)
        return replace(self.pool, gpus=gpus)

    @cached_property
    def reading_pool(self) -> Pool:
        """For passes that read vectors: where those are not kept, they embed."""
        return self.pool if self._vectors_are_kept else embedding_pool(self.config.embed)

    @cached_property
    def _vectors_are_kept(self) -> bool:
        of_previous = self.previous.parts if self.previous else ()
        return self.embeddings.details.get("persisted", True) and None not in of_previous

    @cached_property
    def layout(self) -> ShardLayout:
        config = self.config.cluster
        dimensions: int | None = None
        if config.surrogate != "none":
            dimensions = self.embeddings.details["dimensions"]
            dimensions = min(dimensions, config.surrogate_dimensions or dimensions)
        return ShardLayout(
            vocabulary=Tokenisation.of(self.config).tokenizer.vocabulary,
            run_rows=config.run_rows,
            surrogate_dimensions=dimensions,
            surrogate="int8" if config.surrogate == "int8" else "float16",
            negatives="negatives" in self.columns or self.config.mine.negatives > 0,
            margins=self.config.mine.margins,
            weight="weight" in self.columns,
            images=self.config.corpus.columns.images,
        )

    def fits(self) -> StoredModels:
        """The fits of all groups that are split."""
        if layout_of(self.config) == "group":
            return self._label_fits()
        if self.config.cluster.method == "communities":
            return fit_communities(self)
        coarse = coarse_clusters(self.groups, self.config.cluster.levels)
        for group, model in self.held.items():
            coarse[group] = len(model.fine) if model.coarse else 0
        cells = first_level(self.groups, coarse, self.config.cluster.sample_per_centroid)
        if not len(cells):
            return StoredModels(self.groups)
        first = self._level(StoredModels(self.groups), cells)
        if not coarse.any():
            return first
        models = first.load()
        shares = {group: models[group].shares for group in np.flatnonzero(coarse).tolist()}
        fine = {group: np.diff(self.held[group].first_of_coarse) for group in shares if group in self.held}
        return self._level(first, second_level(self.groups, shares, self.config.cluster.sample_per_centroid, fine))

    def _level(self, above: StoredModels, cells: Cells) -> StoredModels:
        """Samples and fits one level below `above`."""
        config, level = self.config.cluster, 1 + len(above.levels)
        suffix = "" if level == 1 else f" {level}"
        arguments = {
            "config": self.config,
            "generation": self.vectors,
            "groups": self.groups,
            "cells": cells,
            "weighted": "weight" in self.columns,
            "coarse": above,
            "previous": self.previous,
        }
        sample = self.run(f"sample{suffix}", self.units, SampleWorker, arguments, self.reading_pool)
        models = above.load()
        job = FitJob(
            sample=SampleChunks(self.artifact(f"sample{suffix}"), sample.parts, config.features),
            output=self.artifact(f"fit{suffix}"),
            fingerprint=self.identity,
            groups=self.groups,
            cells=cells,
            config=config,
            device=self.device,
            level=level,
            above=above,
            matrices={group: model.matrix for group, model in models.items() if model.matrix is not None},
            held=frozenset(self.held),
            frozen=self.previous if self.previous and self.previous.frozen else None,
        )
        fitted = self._fit(f"fit{suffix}", job, sum(part.bytes for part in sample.parts))
        # A projection that came from above is kept there.
        parts = [part for part in fitted.parts if level == 1 or part.details["content"] == "centroids"]
        return replace(above, levels=(*above.levels, (job.output, parts)))

    def _fit(self, name: str, job: FitJob, sample_bytes: int) -> Manifest:
        """Large samples one after the other by all workers, small ones side by side, the larger first."""
        watch, cells = Stopwatch(), job.cells
        if job.output.is_done(self.identity):
            return _carried(job.output.require())
        done = job.output.begin(self.identity, self.force)
        cell_bytes = sample_bytes * cells.sampled / max(1.0, cells.sampled.sum())
        order = np.argsort(-cells.sampled, kind="stable").tolist()
        spread = current_executor().several_processes
        large = [cell for cell in order if spread and cell_bytes[cell] > distributed.LOCAL_BYTES]
        for cell in large:
            if cell not in done:
                done[cell] = distributed.fit_distributed(job.counting(cell), cell, self.computing_pool)
        units = [Unit(cell, max(1, int(cells.sampled[cell])), None) for cell in order]
        receipts = run_units(name, units, FitWorker, {"job": job}, self.computing_pool, done=done)
        return _carried(job.output.commit(self.identity, receipts, config={}, inputs={}, seconds=watch.seconds))

    def _label_fits(self) -> StoredModels:
        if LABEL not in self.columns:
            raise UsageError(
                "clusters by group: the corpus has no such column (set corpus.columns.group and re-ingest)"
            )
        arguments = {"config": self.config, "generation": self.vectors, "groups": self.groups}
        sums = self.run("sums", self.units, LabelSumsWorker, arguments, self.reading_pool)
        units = [Unit(group, int(rows), None) for group, rows in enumerate(self.groups.rows)]
        arguments = {"sums": self.artifact("sums"), "sums_parts": sums.parts, "groups": self.groups}
        fitted = self.run("fit", units, LabelFitWorker, arguments, self.pool)
        return StoredModels(self.groups, ((self.artifact("fit"), fitted.parts),), labelled=True)

    def plan(self, fits: StoredModels) -> BucketPlan:
        """From the sample's shares and the corpus' bytes on storage."""
        models = fits.load()
        # Compressed text has about a third of its characters' bytes; a token is about four characters and two bytes.
        pairs = {unit.path for unit in row_groups_of(self.corpus)}
        stored = sum(part.bytes for part in self.corpus.parts if part.path in pairs)
        rows = max(1, self.corpus.counts.written)
        tokens = 1.5 * stored / rows
        longest = 2 * (self.config.train.max_query_tokens + self.config.train.max_document_tokens)
        # Images are what they were; written as text they had a third more bytes, which compression takes back.
        content = stored / rows if self.layout.images else min(tokens, longest)
        each = content + 4 * (self.layout.surrogate_dimensions or 0)
        # Tokens are cut, but all of the text comes along. A bucket has one and a quarter shards' bytes at most; where
        # so many rows would have too much text, they count for more.
        each = max(each, 1.25 * self.config.cluster.shard_bytes * self._text_bytes(stored / rows) / _BUCKET_TEXT)
        shares = [models[group].shares if group in models else np.ones(1) for group in range(len(self.groups.names))]
        sizes = [each * rows * share for rows, share in zip(self.groups.rows, shares, strict=True)]
        aside = (self.config.cluster.drop_outliers or 0.0) + (self.mined.inconsistent_share if self.mined else 0.0)
        return plan_buckets(sizes, self.config.cluster.shard_bytes, aside)

    def _text_bytes(self, stored: float) -> float:
        """Of a row in the shuffle, at most, where its pair takes `stored` bytes; a mined negative is as long."""
        vectors = 2 * len(VECTORS) * (self.corpus.details.get("dimensions") or 0)
        expansion = _IMAGE_EXPANSION if self.layout.images else _EXPANSION
        return expansion * max(0.0, stored - vectors) * (1 + self.config.mine.negatives)

    def assign(self, fits: StoredModels, plan: BucketPlan) -> Manifest:
        pool = self.computing_pool if self._vectors_are_kept else self.reading_pool
        arguments = {
            "config": self.config,
            "generation": self.vectors,
            "groups": self.groups,
            "columns": [name for name in self.columns if name not in VECTORS],
            "fits": fits,
            "plan": plan,
            "with_vectors": bool(fits.levels) or self.layout.vectors is not None,
            "device": self.device if pool.gpus or not self.device.startswith("cuda") else "cpu",
            "previous": self.previous,
            "mined": self.mined,
        }
        return self.run("assign", self.units, AssignWorker, arguments, pool)

    def reduce(self, plan: BucketPlan, exchange: Manifest, done: dict[int, Receipt]) -> list[Receipt]:
        rows = bucket_rows(self.artifact("assign"), exchange.parts)
        units = [Unit(bucket, int(rows[bucket]), None) for bucket in np.flatnonzero(rows).tolist()]
        job = ReduceJob(
            exchange=self.artifact("assign"),
            exchange_parts=exchange.parts,
            facts=self.artifact("facts"),
            output=self.clusters,
            fingerprint=self.identity,
            groups=self.groups,
            plan=plan,
            layout=self.layout,
            config=self.config.cluster,
        )
        return run_units("shards", units, ReduceWorker, {"job": job}, self.pool, done=done)

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.clusters.folder.child(EXCHANGE, name.replace(" ", "-")), f"clustering pass {name}")

    def run(self, name: str, units: Sequence[Unit], worker: type, arguments: dict[str, Any], pool: Pool) -> Manifest:
        """One pass, committed; at once when it is whole already."""
        artifact, watch = self.artifact(name), Stopwatch()
        if artifact.is_done(self.identity):
            return _carried(artifact.require())
        done = artifact.begin(self.identity, self.force)
        arguments = {**arguments, "output": artifact, "fingerprint": self.identity}
        receipts = run_units(name, units, worker, arguments, pool, done=done)
        return _carried(artifact.commit(self.identity, receipts, config={}, inputs={}, seconds=watch.seconds))


def _carried(manifest: Manifest) -> Manifest:
    """A pass is removed in the end; what it asked of storage stays with the clusters."""
    carry_over(manifest.traffic)
    return manifest


def run_on_worker(function: Callable[..., Any], argument: Any, pool: Pool) -> Any:
    """Return `function(argument)`, computed by a worker process: what it holds is not in the driver's memory."""
    return current_executor().call(function, argument, pool)
