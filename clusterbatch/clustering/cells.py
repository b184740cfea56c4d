"""Partitions of a corpus and the cells of a fit: a partition, or one coarse cluster of one that has two levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from clusterbatch.clustering.partial_sums import chunk_count
from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import WHOLE_CORPUS, Partitions
from clusterbatch.store.artifact import Manifest
from clusterbatch.store.details import CorpusDetails, details_of

# The default size of clusters, in global batches: about an eighth of the rows is then packed with neighbours' rows.
_AUTO_BATCHES = 4
# Clusters of fewer rows on average mean little: small sources get fewer of them than were asked for.
_LEAST_SIZE = 16
# Above this many clusters one assignment to all of them costs more than one to sqrt(k) coarse and then sqrt(k) fine
# ones.
_FLAT_CLUSTERS = 4096
# Few centroids are fitted to at least this many rows of a partition: with some hundreds they would fit the sample's
# noise.
_LEAST_SAMPLE = 16_384

Grouping = Literal["cluster", "group", "source", "random"]


def grouping_of(config: RunConfig) -> Grouping:
    """Return how rows are grouped: by vectors, by the user's own column, by source alone, or not at all."""
    stratify = config.batches.stratify
    if stratify == "source" or stratify == "random":
        return stratify
    return "group" if stratify == "group" or config.cluster.column else "cluster"


def partitions_of(config: RunConfig, corpus: Manifest) -> Partitions:
    """Return what is clustered separately, each source or the whole corpus, and into how many clusters."""
    sources = details_of(corpus, CorpusDetails)["sources"]
    grouping = grouping_of(config)
    if grouping == "random" or (grouping != "source" and config.cluster.scope == "corpus"):
        sources = {WHOLE_CORPUS: sum(sources.values())}
    names = sorted(name for name, rows in sources.items() if rows)
    rows = np.array([sources[name] for name in names], np.int64)
    if grouping != "cluster":
        clusters = np.ones(len(names), np.int64)
    elif config.cluster.clusters is not None:
        clusters = np.clip(rows // _LEAST_SIZE, 1, config.cluster.clusters)
    elif config.cluster.method == "communities":
        clusters = -(-rows // mean_size(config))
    else:
        clusters = np.maximum(1, np.round(rows / mean_size(config))).astype(np.int64)
    return Partitions(names, rows, clusters)


def mean_size(config: RunConfig) -> int:
    """Return the rows per cluster that decide the number of clusters: `cluster.mean_size`, or four global batches."""
    return config.cluster.mean_size or _AUTO_BATCHES * config.batches.size


def community_size(config: RunConfig, rows: int, clusters: int) -> int:
    """Return the rows of each community of a partition, except for the last one."""
    return mean_size(config) if config.cluster.clusters is None else -(-rows // clusters)


def coarse_clusters(partitions: Partitions, levels: Literal[1, 2] | None) -> np.ndarray:
    """Return (P,) int64 coarse clusters of the partitions that are clustered in two levels, 0 for the others."""
    if levels == 1:
        return np.zeros(len(partitions.names), np.int64)
    two_levels = partitions.clusters > (_FLAT_CLUSTERS if levels is None else 3)
    return np.where(two_levels, np.round(np.sqrt(partitions.clusters)), 0).astype(np.int64)


@dataclass(frozen=True)
class Cells:
    """C cells of one level; all arrays are (C,).

    partition: of each cell; coarse: its coarse cluster there (0 on the first level); clusters: how many it is split
    into; sampled: rows of its sample, about; share: of its partition's rows that are sampled, the same for all cells of
    a partition; chunks: number of chunks of the sample.
    """

    partition: np.ndarray
    coarse: np.ndarray
    clusters: np.ndarray
    sampled: np.ndarray
    share: np.ndarray
    chunks: np.ndarray

    def __len__(self) -> int:
        return len(self.partition)

    @cached_property
    def first_bucket(self) -> np.ndarray:
        """(C + 1,) the first bucket of each cell: every chunk of every cell is a bucket of the sample."""
        return np.concatenate([[0], np.cumsum(self.chunks)])

    @property
    def buckets(self) -> int:
        return int(self.chunks.sum())

    def buckets_of(self, cell: int) -> range:
        """Return the buckets of the cell's chunks."""
        first = self.first_bucket
        return range(int(first[cell]), int(first[cell + 1]))

    def first_of_partition(self, partitions: int) -> np.ndarray:
        """Return (partitions,) the first cell of each partition, -1 if it has none."""
        found = np.full(partitions, -1, np.int64)
        found[self.partition[::-1]] = np.arange(len(self))[::-1]
        return found


def first_level(partitions: Partitions, coarse: np.ndarray, sample_per_centroid: int) -> Cells:
    """Return a cell for every partition that is split; those with `coarse` clusters (0: none) are fitted to these."""
    split = np.flatnonzero(partitions.clusters > 1)
    clusters = np.where(coarse > 0, coarse, partitions.clusters)[split]
    wanted = np.maximum(clusters * sample_per_centroid, _LEAST_SAMPLE)
    share = np.minimum(1.0, wanted / partitions.rows[split])
    return _cells(split, np.zeros_like(split), clusters, partitions.rows[split], wanted, share)


def second_level(
    partitions: Partitions,
    coarse_shares: Mapping[int, np.ndarray],
    sample_per_centroid: int,
    held: Mapping[int, np.ndarray] = {},
) -> Cells:
    """Return a cell for every coarse cluster, also for one without rows (if documents repeat, centroids may coincide).

    coarse_shares: by partition, each coarse cluster's share of its rows; held: by partition, how many fine clusters
    each has if that is given, otherwise they follow from the shares.
    """
    columns: list[list[np.ndarray]] = [[], [], [], [], [], []]
    for number, shares in sorted(coarse_shares.items()):
        clusters = int(partitions.clusters[number])
        fine = held[number] if number in held else apportion(clusters, shares)
        rows, wanted = shares * partitions.rows[number], shares * clusters * sample_per_centroid
        # One for the whole partition: the coarse cluster of a row is known only once it was read.
        share = min(1.0, clusters * sample_per_centroid / partitions.rows[number])
        cells = np.full(len(shares), number), np.arange(len(shares)), fine, rows, wanted, np.full(len(shares), share)
        for column, value in zip(columns, cells, strict=True):
            column.append(value)
    return _cells(*map(np.concatenate, columns))


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Return (K,) integers of at least 1 that sum to `total`, by largest remainder of (K,) shares."""
    assert total >= len(shares)
    exact = shares / shares.sum() * (total - len(shares))
    floor = np.floor(exact).astype(np.int64)
    missing = total - len(shares) - int(floor.sum())
    floor[np.argsort(floor - exact, kind="stable")[:missing]] += 1
    return floor + 1


def _cells(
    partition: np.ndarray,
    coarse: np.ndarray,
    clusters: np.ndarray,
    rows: np.ndarray,
    wanted: np.ndarray,
    share: np.ndarray,
) -> Cells:
    sampled = np.minimum(rows, wanted).astype(float)
    counts = [chunk_count(int(n), int(k)) for n, k in zip(sampled, clusters, strict=True)]
    return Cells(partition, coarse, clusters, sampled, share, np.array(counts, np.int64))
