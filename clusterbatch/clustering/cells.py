"""What is fitted by itself: a group, or one coarse cluster of a group that is clustered in two levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.sums import chunk_count

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
