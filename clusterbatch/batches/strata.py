"""Strata and groups: what strategies are reduced to, the one form that the plan can count with.

A **stratum** is a set of rows that batches never leave: a source, the pool of the sources that are smaller than a
batch, or (random) the whole corpus. Inside it lie **groups**, in packing order; a batch takes its rows from one group
or from `clusters_per_batch` groups, and what remains of a group is packed with its neighbours' remains. Which they are
for each strategy: strategies.py.

With `uniform_clusters` every cluster that fills a batch is a stratum of its own, drawn as often as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clusterbatch.batches.strategies import STRATEGIES
from clusterbatch.config import BatchesConfig
from clusterbatch.corpus.groups import WHOLE_CORPUS
from clusterbatch.errors import UsageError
from clusterbatch.shards.index import ClusterIndex

POOL = "(small sources)"

# Where no clusters_per_batch is given, so many rows at most shall be in packed batches.
_PACKED_SHARE = 0.25


@dataclass(frozen=True)
class Stratum:
    """Rows that are planned together: p pieces of the cluster index, in g groups.

    pieces: (p,) entries of the cluster index; piece_rows: (p,) their rows; first_piece: (g + 1,) where each group's
    pieces begin; whole_runs: whether rows move in the runs of the layout; scattered: whether the members of a group
    are drawn from all over the stratum (random_groups).
    """

    number: int
    name: str
    sources: Sequence[str]
    pieces: np.ndarray
    piece_rows: np.ndarray
    first_piece: np.ndarray
    run_rows: int
    whole_runs: bool
    scattered: bool
    groups_per_batch: int

    @property
    def rows(self) -> int:
        return int(self.row_start[-1])

    @cached_property
    def row_start(self) -> np.ndarray:
        """(p + 1,) first row of each piece among the stratum's rows."""
        return _starts(self.piece_rows)

    @cached_property
    def run_start(self) -> np.ndarray:
        """(p + 1,) first full run of each piece among the stratum's full runs."""
        return _starts(self.piece_rows // self.run_rows)

    @cached_property
    def tail_start(self) -> np.ndarray:
        """(p + 1,) first row of each piece's short last run among the rows of all short runs."""
        return _starts(self.piece_rows % self.run_rows)

    @cached_property
    def group_rows(self) -> np.ndarray:
        """(g,)"""
        return np.diff(self.row_start[self.first_piece])

    @cached_property
    def group_runs(self) -> np.ndarray:
        """(g,) full runs."""
        return np.diff(self.run_start[self.first_piece])

    @cached_property
    def group_tail(self) -> np.ndarray:
        """(g,) rows in short runs."""
        return np.diff(self.tail_start[self.first_piece])


def build_strata(index: ClusterIndex, config: BatchesConfig, layout: str) -> tuple[list[Stratum], list[str]]:
    """The strata of a corpus under a strategy, and the names of the sources that are left out.

    `layout` says by what the shards are grouped: cluster, group, source or random. Where a strategy can do without the
    layout it was made for, it moves single rows, which reads a run for each: right for comparisons on one machine,
    costly on object storage.

    Raises UsageError when the layout cannot serve the strategy, fewer rows than a batch take part, or a weight names
    no source.
    """
    _check_layout(index, config, layout)
    weights = _weights(index, config)
    rows_of_source = np.bincount(index.source, weights=index.rows, minlength=len(index.sources)).astype(np.int64)
    total = int(rows_of_source[weights > 0].sum())
    if total < config.size:
        raise UsageError(f"batches.size: a batch of {config.size} pairs, but there are only {total} to choose from")
    if not STRATEGIES[config.stratify].by_source:
        everything = range(len(index.sources))
        return [_stratum(index, config, layout, 0, WHOLE_CORPUS, everything, np.arange(len(index)))], []
    drawn = np.flatnonzero(weights > 0)
    large, small = drawn[rows_of_source[drawn] >= config.size], drawn[rows_of_source[drawn] < config.size]
    left_out = weights <= 0
    members: list[tuple[str, Sequence[int]]] = [(index.sources[source], [source]) for source in large.tolist()]
    if config.small_sources == "leave_out":
        left_out[small] = True
    elif len(small):
        members.append((POOL, small.tolist()))
    if not members:
        raise UsageError(f"batches.size: no source has {config.size} pairs; make batches smaller or pool small_sources")
    sets: list[tuple[str, Sequence[int], np.ndarray]] = []
    for name, sources in members:
        pieces = _pieces(index, sources)
        cuts = _by_cluster(index, config, pieces) if config.uniform_clusters and name != POOL else [pieces]
        sets += [(name, sources, cut) for cut in cuts]
    strata = [_stratum(index, config, layout, number, *each) for number, each in enumerate(sets)]
    return strata, [index.sources[source] for source in np.flatnonzero(left_out)]


def _pieces(index: ClusterIndex, sources: Sequence[int]) -> np.ndarray:
    # Pieces of one source are consecutive.
    first, last = (np.searchsorted(index.source, sources, side) for side in ("left", "right"))
    return np.concatenate([np.arange(start, stop) for start, stop in zip(first, last, strict=True)])


def _by_cluster(index: ClusterIndex, config: BatchesConfig, pieces: np.ndarray) -> list[np.ndarray]:
    """The pieces of a source, a set for each cluster that fills a batch; all smaller clusters share one.

    Where they do not fill a batch either, they go with the last one that does.
    """
    clusters, cluster = np.unique(index.cluster[pieces] // config.merged_clusters, return_inverse=True)
    rows = np.bincount(cluster, weights=index.rows[pieces], minlength=len(clusters))
    fills = rows >= config.size
    order = np.argsort(cluster, kind="stable")
    of_cluster = np.split(pieces[order], np.cumsum(np.bincount(cluster, minlength=len(clusters)))[:-1])
    sets = [of_cluster[number] for number in np.flatnonzero(fills).tolist()]
    if fills.all():
        return sets
    rest = pieces[~fills[cluster]]
    if rows[~fills].sum() >= config.size or not sets:
        return [*sets, rest]
    sets[-1] = np.sort(np.concatenate([sets[-1], rest]))
    return sets


def _stratum(
    index: ClusterIndex,
    config: BatchesConfig,
    layout: str,
    number: int,
    name: str,
    sources: Sequence[int],
    pieces: np.ndarray,
) -> Stratum:
    strategy = STRATEGIES[config.stratify]
    group = strategy.groups(index, pieces, config) if strategy.groups else np.zeros(len(pieces), np.int64)
    source = index.source[pieces] if strategy.by_source else np.zeros(len(pieces), np.int64)
    order = np.lexsort((group, source))
    pieces, group, source = pieces[order], group[order], source[order]
    changes = (np.diff(source) != 0) | (np.diff(group) != 0)
    first_piece = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(pieces)]])
    rows = index.rows[pieces]
    group_rows = np.add.reduceat(rows, first_piece[:-1])
    return Stratum(
        number=number,
        name=name,
        sources=[index.sources[source] for source in sources],
        pieces=pieces,
        piece_rows=rows,
        first_piece=first_piece,
        run_rows=index.run_rows,
        whole_runs=strategy.moves_runs(config.stratify, layout),
        scattered=strategy.scattered,
        groups_per_batch=_groups_per_batch(config, group_rows, index.run_rows),
    )


def _groups_per_batch(config: BatchesConfig, group_rows: np.ndarray, run_rows: int) -> int:
    if STRATEGIES[config.stratify].groups is None:
        return 1
    if config.clusters_per_batch is not None:
        if config.size % config.clusters_per_batch:
            raise UsageError(
                f"batches.clusters_per_batch: {config.clusters_per_batch} does not divide batches.size {config.size}"
            )
        return config.clusters_per_batch
    divisors = [m for m in range(1, config.size // run_rows + 1) if config.size % m == 0] or [1]
    # Parts of whole runs are read without waste.
    choices = [m for m in divisors if config.size // m % run_rows == 0] or divisors
    for choice in choices:
        if packed_rows(group_rows, config.size // choice) <= _PACKED_SHARE * group_rows.sum():
            return choice
    return choices[-1]


def packed_rows(group_rows: np.ndarray, part: int) -> int:
    """Rows that remain when every group is cut into whole parts of `part` rows."""
    return int((group_rows % part).sum())


def _check_layout(index: ClusterIndex, config: BatchesConfig, layout: str) -> None:
    if layout not in (STRATEGIES[config.stratify].layouts or (layout,)):
        raise UsageError(
            f"batches.stratify: {config.stratify} needs shards laid out for it, these are by {layout}; "
            "run the stage cluster with this strategy, in a workspace of its own"
        )
    if config.stratify == "source" and index.sources == [WHOLE_CORPUS]:
        raise UsageError("batches.stratify: source, but these shards do not tell sources apart (cluster.scope: corpus)")


def _weights(index: ClusterIndex, config: BatchesConfig) -> np.ndarray:
    """(sources,) float64, 1 where nothing is said."""
    for name in config.source_weights or {}:
        if name not in index.sources:
            raise UsageError(f"batches.source_weights.{name}: the corpus has no such source")
    return np.array([(config.source_weights or {}).get(name, 1.0) for name in index.sources])


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
