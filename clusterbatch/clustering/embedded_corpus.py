"""Common inputs of all ways to cluster: an embedded corpus, and a factory of passes over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clusterbatch.clustering.cells import partitions_of
from clusterbatch.clustering.model import PartitionModel, StoredParts
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.stage import embedding_pool
from clusterbatch.embedding.vectors import VectorSource, tasks
from clusterbatch.errors import DataError
from clusterbatch.runtime import Pass, Pool, WorkItem
from clusterbatch.runtime.resources import device_for, gpus_for
from clusterbatch.store import Artifact, Folder, Manifest
from clusterbatch.store.details import has_vectors
from clusterbatch.store.tables import parquet_columns
from clusterbatch.store.workspace import Workspace


@dataclass(frozen=True)
class EmbeddedRows:
    """The rows of an embedded corpus, for the workers of a pass. Picklable.

    generation: whose embeddings are read.
    """

    config: RunConfig
    generation: int
    partitions: Partitions

    @property
    def corpus(self) -> Artifact:
        return Workspace(self.config).corpus

    def vectors(self) -> VectorSource:
        return VectorSource(self.config, self.generation)


@dataclass(frozen=True)
class EmbeddedCorpus:
    """An embedded corpus, for the driver: its partitions, work items and pools.

    generation: whose embeddings are clustered; previous: the generation whose clusters are continued, if any.
    """

    config: RunConfig
    generation: int
    corpus: Manifest
    embeddings: Manifest
    previous: Previous | None = None

    @cached_property
    def rows(self) -> EmbeddedRows:
        return EmbeddedRows(self.config, self.generation, self.partitions)

    @cached_property
    def partitions(self) -> Partitions:
        """Partitions and how many clusters each is split into; those that are held keep their number."""
        partitions = partitions_of(self.config, self.corpus)
        clusters = partitions.clusters.copy()
        for partition, model in self.held.items():
            clusters[partition] = len(model.shares)
        return replace(partitions, clusters=clusters)

    @cached_property
    def held(self) -> Mapping[int, PartitionModel]:
        """The models of the partitions whose clusters continue those of the generation before."""
        return self.previous.held(partitions_of(self.config, self.corpus)) if self.previous else {}

    @cached_property
    def items(self) -> list[WorkItem]:
        return tasks(self.corpus, self.embeddings)

    @cached_property
    def columns(self) -> list[str]:
        """Columns of the corpus. Raises DataError if it has no rows."""
        folder, units = Workspace(self.config).corpus.folder, row_groups_of(self.corpus)
        if not units:
            raise DataError(f"{folder.uri}: the corpus has no rows")
        return parquet_columns(folder, units[0].path)

    @cached_property
    def device(self) -> str:
        """Device of the fits' matrix products."""
        return device_for(self.config.cluster.device)

    @cached_property
    def assigning_device(self) -> str:
        """Device on which rows are assigned: the workers may have no GPU, if they embed on CPUs."""
        return self.device if self.assigning_pool.gpus or not self.device.startswith("cuda") else "cpu"

    @cached_property
    def pool(self) -> Pool:
        """Workers of passes that neither multiply large matrices nor read vectors."""
        return Pool(self.config.cluster.workers, self.config.cluster.cpus_per_worker)

    @cached_property
    def computing_pool(self) -> Pool:
        """Workers of passes that multiply matrices."""
        gpus = gpus_for(self.device, self.pool.workers, self.config.cluster.gpus_per_worker)
        return replace(self.pool, gpus=gpus)

    @cached_property
    def reading_pool(self) -> Pool:
        """Workers of passes that read vectors: if those are not kept, the workers embed."""
        return self.pool if self._vectors_are_kept else embedding_pool(self.config.embed)

    @cached_property
    def assigning_pool(self) -> Pool:
        return self.computing_pool if self._vectors_are_kept else self.reading_pool

    @cached_property
    def _vectors_are_kept(self) -> bool:
        of_previous = self.previous.parts if self.previous else ()
        return has_vectors(self.embeddings) and None not in of_previous


@dataclass(frozen=True)
class PassFactory:
    """Make passes whose outputs are artifacts of their own in `folder`, until the caller removes that.

    identity: the fingerprint of the result that the passes lead to; tasks: what a pass over the rows runs. Outputs of
    another result or of other tasks are replaced: whose result the folder belongs to was asked before.
    """

    folder: Folder
    identity: str
    tasks: Sequence[WorkItem]

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.folder.child(name.replace(" ", "-")), f"clustering pass {name}")

    def create(self, name: str, worker: type, arguments: Mapping[str, Any], pool: Pool) -> Pass:
        return Pass(name, self.artifact(name), self._identity_of_passes, worker, arguments, pool, temporary=True)

    def run(
        self, name: str, items: Sequence[WorkItem], worker: type, arguments: Mapping[str, Any], pool: Pool
    ) -> StoredParts:
        """Commit a pass over `items`, at once if an earlier attempt did; return its parts."""
        manifest = self.create(name, worker, arguments, pool).commit(items, force=True)
        return StoredParts(self.artifact(name), manifest.parts)

    @cached_property
    def _identity_of_passes(self) -> str:
        # Rows go from one pass to the next by the number of their task.
        covered = [item.covers for item in self.tasks]
        return fingerprint("passes", self.identity, covered) if any(covered) else self.identity
