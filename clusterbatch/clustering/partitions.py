"""What is fitted by itself: a group, or one coarse cluster of a group that is clustered in two levels.

What is clustered by itself: each source, or the corpus as a whole; and into how many clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clusterbatch.clustering.partial_sums import chunk_count
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import WHOLE_CORPUS, Groups
from clusterbatch.store.artifact import Manifest

# Where nothing is said: clusters of this many global batches, so that about an eighth of the rows is packed with
# neighbours' rows.
_AUTO_BATCHES = 4
# Clusters of fewer rows on average mean little: small sources get fewer of them than were asked for.
_LEAST_SIZE = 16
# Above so many clusters one assignment to all of them costs more than one to sqrt(k) coarse and then sqrt(k) fine ones.
_FLAT_CLUSTERS = 4096

Layout = Literal["cluster", "group", "source", "random"]


def layout_of(config: RunConfig) -> Layout:
    """How rows are laid out: by vectors, by the user's own column, by source alone, or not at all."""
    stratify = config.batches.stratify
    if stratify == "source" or stratify == "random":
        return stratify
    return "group" if stratify == "group" or config.cluster.column else "cluster"


def groups_of(config: RunConfig, corpus: Manifest) -> Groups:
    """The groups of a corpus under this configuration."""
    sources: dict[str, int] = corpus.details["sources"]
    layout = layout_of(config)
    if layout == "random" or (layout != "source" and config.cluster.scope == "corpus"):
        sources = {WHOLE_CORPUS: sum(sources.values())}
    names = sorted(name for name, rows in sources.items() if rows)
    rows = np.array([sources[name] for name in names], np.int64)
    if layout != "cluster":
        clusters = np.ones(len(names), np.int64)
    elif config.cluster.clusters is not None:
        clusters = np.clip(rows // _LEAST_SIZE, 1, config.cluster.clusters)
    elif config.cluster.method == "communities":
        clusters = -(-rows // mean_size(config))
    else:
        clusters = np.maximum(1, np.round(rows / mean_size(config))).astype(np.int64)
    return Groups(names, rows, clusters)


def mean_size(config: RunConfig) -> int:
    """Rows per cluster that the number of clusters follows from: `cluster.mean_size`, else four global batches."""
    return config.cluster.mean_size or _AUTO_BATCHES * config.batches.size


def community_size(config: RunConfig, rows: int, clusters: int) -> int:
    """Rows that a community of a group has, all but the last."""
    return mean_size(config) if config.cluster.clusters is None else -(-rows // clusters)


def coarse_clusters(groups: Groups, levels: Literal[1, 2] | None) -> np.ndarray:
    """(G,) int64: coarse clusters of those groups that are clustered in two levels, 0 for the others."""
    if levels == 1:
        return np.zeros(len(groups.names), np.int64)
    two_levels = groups.clusters > (_FLAT_CLUSTERS if levels is None else 3)
    return np.where(two_levels, np.round(np.sqrt(groups.clusters)), 0).astype(np.int64)


# Few centroids are fitted to at least so many rows of a group: with some hundreds they would fit the sample's noise.
_LEAST_SAMPLE = 16_384


@dataclass(frozen=True)
class Cells:
    """C cells of one level; all arrays are (C,).

    group: the group of each; coarse: its coarse cluster there (0 on the first level); clusters: how many it is split
    into; sampled: rows of its sample, about; share: of its group's rows that are sampled, the same for all cells of a
    group; chunks: in how many the sample is cut.
    """

    group: np.ndarray
    coarse: np.ndarray
    clusters: np.ndarray
    sampled: np.ndarray
    share: np.ndarray
    chunks: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    @property
    def first_bucket(self) -> np.ndarray:
        """(C + 1,): every chunk of every cell is a bucket of the sample."""
        return np.concatenate([[0], np.cumsum(self.chunks)])

    @property
    def buckets(self) -> int:
        return int(self.chunks.sum())

    def first_of_group(self, groups: int) -> np.ndarray:
        """(groups,): the first cell of each group, -1 where it has none."""
        found = np.full(groups, -1, np.int64)
        found[self.group[::-1]] = np.arange(len(self))[::-1]
        return found


def first_level(groups: Groups, coarse: np.ndarray, sample_per_centroid: int) -> Cells:
    """A cell for every group that is split; groups with `coarse` clusters (0: none) are fitted to those first."""
    split = np.flatnonzero(groups.clusters > 1)
    clusters = np.where(coarse > 0, coarse, groups.clusters)[split]
    wanted = np.maximum(clusters * sample_per_centroid, _LEAST_SAMPLE)
    share = np.minimum(1.0, wanted / groups.rows[split])
    return _cells(split, np.zeros_like(split), clusters, groups.rows[split], wanted, share)


def second_level(
    groups: Groups,
    coarse_shares: Mapping[int, np.ndarray],
    sample_per_centroid: int,
    held: Mapping[int, np.ndarray] = {},
) -> Cells:
    """A cell for every coarse cluster, also for one that has no rows (where documents repeat, centroids may coincide).

    coarse_shares: by group, each coarse cluster's share of its rows; held: by group, how many fine clusters each has
    where that is given, else they follow from the shares.
    """
    columns: list[list[np.ndarray]] = [[], [], [], [], [], []]
    for number, shares in sorted(coarse_shares.items()):
        fine = held[number] if number in held else apportion(int(groups.clusters[number]), shares)
        rows, wanted = shares * groups.rows[number], shares * groups.clusters[number] * sample_per_centroid
        # One for the whole group: the coarse cluster of a row is known only once it was read.
        share = min(1.0, groups.clusters[number] * sample_per_centroid / groups.rows[number])
        cells = np.full(len(shares), number), np.arange(len(shares)), fine, rows, wanted, np.full(len(shares), share)
        for column, value in zip(columns, cells, strict=True):
            column.append(value)
    return _cells(*map(np.concatenate, columns))


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """(K,) integers of at least 1 that sum to `total`, by largest remainder."""
    assert total >= len(shares)
    exact = shares / shares.sum() * (total - len(shares))
    floor = np.floor(exact).astype(np.int64)
    missing = total - len(shares) - int(floor.sum())
    floor[np.argsort(floor - exact, kind="stable")[:missing]] += 1
    return floor + 1


def _cells(
    group: np.ndarray,
    coarse: np.ndarray,
    clusters: np.ndarray,
    rows: np.ndarray,
    wanted: np.ndarray,
    share: np.ndarray,
) -> Cells:
    sampled = np.minimum(rows, wanted).astype(float)
    counts = [chunk_count(int(n), int(k)) for n, k in zip(sampled, clusters, strict=True)]
    return Cells(group, coarse, clusters, sampled, share, np.array(counts, np.int64))
