"""Strata and groups: the one form that all strategies are reduced to, so that the plan can compute with them.

A **stratum** is a set of rows that batches never leave: a source, the pool of the sources that are smaller than a
batch, or (random) the whole corpus. Inside it are **groups**, in packing order; a batch takes its rows from one group
or from `clusters_per_batch` groups, and what remains of a group is packed with its neighbours' remains. strategies.py
lists both for each strategy.

With `uniform_clusters` every cluster that fills a batch is a stratum of its own, drawn as often as any other.

If semantic duplicates are kept apart (`cluster.duplicates.action: apart`), the first rows of their groups and all rows
without duplicates are a stratum, the second rows another, and so on.
Those that do not fill a batch stay with the first.

Batches of one cluster teach nothing if most of its rows have the same document (or query): all their negatives are
copies of the positive. Such crowded clusters are mixed, row by row, with each other and with as many rows of the
clusters next to them in packing order: a stratum of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clusterbatch.batches.strategies import STRATEGIES
from clusterbatch.config import BatchesConfig
from clusterbatch.corpus.partitions import WHOLE_CORPUS
from clusterbatch.errors import UsageError
from clusterbatch.shards.index import ClusterIndex

POOL = "(small sources)"

# If no clusters_per_batch is given, at most this share of the rows is to be in packed batches.
_PACKED_SHARE = 0.25
# A cluster is crowded if more than this share of its negatives would be copies of the positive.
_CROWDED = 0.5


@dataclass(frozen=True)
class Stratum:
    """Rows that are planned together: p pieces of the cluster index, in g groups.

    pieces: (p,) entries of the cluster index; piece_rows: (p,) their rows; first_piece: (g + 1,) where each group's
    pieces begin; whole_runs: whether rows move in the runs of the layout; scattered: whether the members of a group
    are drawn from all over the stratum (random_groups); mixed: number of clusters that are mixed in its one group,
    0 in any other stratum; crowding: estimated share of a row's negatives that are copies of its positive, if rows of
    the stratum met at random.
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
    mixed: int = 0
    crowding: float = 0.0

    @property
    def clusters(self) -> int:
        """Number of the strategy's groups, those that are mixed counted singly."""
        return self.mixed or len(self.group_rows)

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
        """(g,) rows of each group."""
        return np.diff(self.row_start[self.first_piece])

    @cached_property
    def group_runs(self) -> np.ndarray:
        """(g,) full runs of each group."""
        return np.diff(self.run_start[self.first_piece])

    @cached_property
    def group_tail(self) -> np.ndarray:
        """(g,) rows of each group in short runs."""
        return np.diff(self.tail_start[self.first_piece])


def build_strata(index: ClusterIndex, config: BatchesConfig, layout: str) -> tuple[list[Stratum], list[str]]:
    """Return the strata of a corpus under a strategy, and the names of the sources that are left out.

    `layout` says what the shards are grouped by: cluster, group, source or random. If a strategy can do without the
    layout it was made for, it moves single rows, which reads a run for each: right for comparisons on one machine,
    costly on object storage.

    Raises UsageError if the layout cannot serve the strategy, fewer rows than a batch take part, or a weight names
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
        layers = _by_layer(index, config, np.arange(len(index)))
        return [
            _stratum(index, config, layout, number, WHOLE_CORPUS, everything, pieces, False)
            for number, pieces in enumerate(layers)
        ], []
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
    sets: list[tuple[str, Sequence[int], np.ndarray, bool]] = []
    for name, sources in members:
        rest, mixed = _without_crowded(index, config, _pieces(index, sources))
        for layer in _by_layer(index, config, rest):
            cuts = _by_cluster(index, config, layer) if config.uniform_clusters and name != POOL else [layer]
            sets += [(name, sources, cut, False) for cut in cuts if len(cut)]
        sets += [(name, sources, mixed, True)] if len(mixed) else []
    strata = [_stratum(index, config, layout, number, *each) for number, each in enumerate(sets)]
    return strata, [index.sources[source] for source in np.flatnonzero(left_out)]


def _pieces(index: ClusterIndex, sources: Sequence[int]) -> np.ndarray:
    # Pieces of one source are consecutive.
    first, last = (np.searchsorted(index.source, sources, side) for side in ("left", "right"))
    return np.concatenate([np.arange(start, stop) for start, stop in zip(first, last, strict=True)])


def _without_crowded(index: ClusterIndex, config: BatchesConfig, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the pieces of a stratum into (those of its strategy's groups, those to be mixed row by row)."""
    strategy, none = STRATEGIES[config.stratify], pieces[:0]
    if strategy.groups is None or strategy.scattered or not len(index.crowding):
        return pieces, none
    group = np.stack([index.source[pieces], strategy.groups(index, pieces, config)])
    number = np.unique(group, axis=1, return_inverse=True)[1].ravel()
    rows = np.bincount(number, weights=index.rows[pieces]).astype(np.int64)
    copies = np.bincount(number, weights=index.crowding[pieces] * index.rows[pieces].astype(np.float64) ** 2)
    # What is smaller than half a batch is packed with its neighbours anyway.
    crowded = np.flatnonzero((copies / rows.astype(np.float64) ** 2 > _CROWDED) & (2 * rows >= config.size))
    if not len(crowded):
        return pieces, none
    # Neighbours of crowded groups first; in packing order where two are equally near.
    groups = np.arange(len(rows))
    after = np.searchsorted(crowded, groups).clip(max=len(crowded) - 1)
    before = (after - 1).clip(min=0)
    distance = np.minimum(np.abs(groups - crowded[before]), np.abs(groups - crowded[after]))
    order = np.argsort(distance, kind="stable")
    wanted = max(2 * int(rows[crowded].sum()), config.size)
    taken = order[: int(np.searchsorted(np.cumsum(rows[order]), wanted)) + 1]
    is_taken = np.zeros(len(rows), bool)
    is_taken[taken] = True
    if rows[~is_taken].sum() < config.size:
        is_taken[:] = True
    return pieces[~is_taken[number]], pieces[is_taken[number]]


def _by_layer(index: ClusterIndex, config: BatchesConfig, pieces: np.ndarray) -> list[np.ndarray]:
    """Return the pieces of a stratum, a set for each layer of semantic duplicates.

    Layers that do not fill a batch stay with the first, where their rows are few among many.
    """
    if not len(index.layer) or not len(pieces):
        return [pieces]
    layer, rows = index.layer[pieces], index.rows[pieces]
    fills = np.bincount(layer, weights=rows) >= config.size
    layer = np.where(fills[layer], layer, 0)
    if rows[layer == 0].sum() < config.size:
        return [pieces]
    return [pieces[layer == number] for number in np.unique(layer)]


def _by_cluster(index: ClusterIndex, config: BatchesConfig, pieces: np.ndarray) -> list[np.ndarray]:
    """Return the pieces of a source, a set for each cluster that fills a batch; all smaller clusters share one.

    If they do not fill a batch either, they go with the last one that does.
    """
    if not len(pieces):
        return []
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
    mixed: bool,
) -> Stratum:
    strategy = STRATEGIES[config.stratify]
    group = strategy.groups(index, pieces, config) if strategy.groups else np.zeros(len(pieces), np.int64)
    source = index.source[pieces] if strategy.by_source else np.zeros(len(pieces), np.int64)
    order = np.lexsort((group, source))
    pieces, group, source = pieces[order], group[order], source[order]
    changes = (np.diff(source) != 0) | (np.diff(group) != 0)
    first_piece = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(pieces)]])
    clusters = len(first_piece) - 1
    if mixed:
        first_piece = first_piece[[0, -1]]
    rows = index.rows[pieces]
    crowding = 0.0
    if len(index.crowding):
        crowding = float(index.crowding[pieces] @ (rows / rows.sum()) ** 2)
    group_rows = np.add.reduceat(rows, first_piece[:-1])
    return Stratum(
        number=number,
        name=name,
        sources=[index.sources[source] for source in sources],
        pieces=pieces,
        piece_rows=rows,
        first_piece=first_piece,
        run_rows=index.run_rows,
        whole_runs=not mixed and strategy.moves_runs(config.stratify, layout),
        scattered=strategy.scattered,
        groups_per_batch=1 if mixed else _groups_per_batch(config, group_rows, index.run_rows),
        mixed=clusters if mixed else 0,
        crowding=crowding,
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
    """Return the number of rows that remain when every group is cut into whole parts of `part` rows."""
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
    """Return (sources,) float64 weights, 1 for sources that are not named."""
    for name in config.source_weights or {}:
        if name not in index.sources:
            raise UsageError(f"batches.source_weights.{name}: the corpus has no such source")
    return np.array([(config.source_weights or {}).get(name, 1.0) for name in index.sources])


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
