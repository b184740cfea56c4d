"""Strata and groups: the strategies, reduced to one form that the plan can count with.

A **stratum** is a set of rows that batches never leave: a source, the pool of the sources that are smaller than a
batch, or (random) the whole corpus. Inside it lie **groups**, in packing order; a batch takes its rows from one group
or from `clusters_per_batch` groups, and what remains of a group is packed with its neighbours' remains.

    strategy        stratum   groups                                   smallest thing that is moved
    cluster         source    its clusters                             a run (consecutive rows, one read)
    source          source    one: all of it                           a row, or a run of a layout made for it
    random          corpus    one: all of it                           a row, or a run of a layout made for it
    random_groups   source    as large as its clusters, of any rows    a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clusterbatch.clustering.index import ClusterIndex
from clusterbatch.config import BatchesConfig
from clusterbatch.errors import UsageError

POOL = "(small sources)"
CORPUS = "(all sources)"

# Where no clusters_per_batch is given, so many rows at most shall be in packed batches.
_PACKED_SHARE = 0.25


@dataclass(frozen=True)
class Stratum:
    """Rows that are planned together.

    name: the source's, POOL or CORPUS; pieces: (p,) entries of the cluster index; piece_start: (p + 1,) first row of
    each piece among the stratum's rows; group_rows: (g,) sizes of the groups; granule: rows that move together;
    scattered: whether group members are drawn from all over the stratum (random_groups).
    """

    number: int
    name: str
    sources: Sequence[str]
    pieces: np.ndarray
    piece_start: np.ndarray
    group_rows: np.ndarray
    granule: int
    scattered: bool
    groups_per_batch: int

    @property
    def rows(self) -> int:
        return int(self.piece_start[-1])


def build_strata(index: ClusterIndex, config: BatchesConfig, layout: str) -> tuple[list[Stratum], list[str]]:
    """The strata of a corpus under a strategy, and the sources that are left out.

    `layout` says by what the shards are grouped: cluster, source or random. A strategy that does not fit the layout
    moves single rows, which reads a run for each: right for comparisons on one machine, costly on object storage.

    Raises UsageError when the corpus has fewer rows than a batch, or a source weight names no source.
    """
    if index.total_rows < config.size:
        raise UsageError(f"batches.size: a batch of {config.size} pairs, but the corpus has only {index.total_rows}")
    _check_weights(index, config)
    rows_of_source = np.bincount(index.source, weights=index.rows, minlength=len(index.sources)).astype(np.int64)
    everything = np.arange(len(index))
    if config.stratify == "random":
        return [_stratum(index, config, layout, 0, CORPUS, index.sources, everything)], []
    large = [number for number, rows in enumerate(rows_of_source) if rows >= config.size]
    small = [number for number, rows in enumerate(rows_of_source) if rows < config.size]
    members = [(index.sources[number], [number]) for number in large]
    if small and config.small_sources == "pool":
        members.append((POOL, small))
    if not members:
        raise UsageError(f"batches.size: no source has {config.size} pairs; make batches smaller or pool small_sources")
    strata = []
    for number, (name, sources) in enumerate(members):
        pieces = everything[np.isin(index.source, sources)]
        strata.append(_stratum(index, config, layout, number, name, [index.sources[s] for s in sources], pieces))
    left_out = [index.sources[number] for number in small] if config.small_sources == "leave_out" else []
    return strata, left_out


def _stratum(
    index: ClusterIndex,
    config: BatchesConfig,
    layout: str,
    number: int,
    name: str,
    sources: Sequence[str],
    pieces: np.ndarray,
) -> Stratum:
    rows = index.rows[pieces]
    by_cluster = config.stratify in ("cluster", "random_groups")
    fits = config.stratify == layout
    groups = rows if by_cluster or fits else np.array([rows.sum()])
    return Stratum(
        number=number,
        name=name,
        sources=list(sources),
        pieces=pieces,
        piece_start=np.concatenate([[0], np.cumsum(rows)]),
        group_rows=groups,
        granule=index.run_rows if fits else 1,
        scattered=config.stratify == "random_groups",
        groups_per_batch=_groups_per_batch(config, groups, index.run_rows) if by_cluster else 1,
    )


def _groups_per_batch(config: BatchesConfig, group_rows: np.ndarray, run_rows: int) -> int:
    if config.clusters_per_batch is not None:
        if config.size % config.clusters_per_batch:
            raise UsageError(
                f"batches.clusters_per_batch: {config.clusters_per_batch} does not divide batches.size {config.size}"
            )
        return config.clusters_per_batch
    choices = [m for m in range(1, config.size // run_rows + 1) if config.size % m == 0] or [1]
    for choice in choices:
        if packed_rows(group_rows, config.size // choice) <= _PACKED_SHARE * group_rows.sum():
            return choice
    return choices[-1]


def packed_rows(group_rows: np.ndarray, part: int) -> int:
    """Rows that remain when every group is cut into whole parts of `part` rows."""
    return int((group_rows % part).sum())


def _check_weights(index: ClusterIndex, config: BatchesConfig) -> None:
    for name, weight in (config.source_weights or {}).items():
        if name not in index.sources:
            raise UsageError(f"batches.source_weights.{name}: the corpus has no such source")
        if not np.isfinite(weight) or weight < 0:
            raise UsageError(f"batches.source_weights.{name}: must be 0 or more (got {weight})")
    if config.source_weights and config.stratify == "random":
        raise UsageError("batches.source_weights: with stratify: random there are no batches of one source to weight")
