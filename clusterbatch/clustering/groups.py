"""What is clustered by itself: each source, or the corpus as a whole; and into how many clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Manifest

# The name in the cluster index of what is not separated by source.
WHOLE_CORPUS = "(all)"
# Where nothing is said: clusters of this many global batches, so that about an eighth of the rows is packed with
# neighbours' rows.
_AUTO_BATCHES = 4
# Clusters of fewer rows on average mean little: small sources get fewer of them than were asked for.
_LEAST_SIZE = 16
# Above so many clusters one assignment to all of them costs more than one to sqrt(k) coarse and then sqrt(k) fine ones.
_FLAT_CLUSTERS = 4096

Layout = Literal["cluster", "group", "source", "random"]


@dataclass(frozen=True)
class Groups:
    """names: sorted; rows: (G,) rows of each; clusters: (G,) how many clusters each is to be split into."""

    names: list[str]
    rows: np.ndarray
    clusters: np.ndarray

    def of_rows(self, source: pa.ChunkedArray) -> np.ndarray:
        """(rows,) int64: the group of each row, by its source."""
        if self.names == [WHOLE_CORPUS]:
            return np.zeros(len(source), np.int64)
        found = pc.index_in(source, pa.array(self.names))
        if found.null_count:
            unknown = pc.filter(source, pc.is_null(found))[0].as_py()
            raise DataError(f"corpus: a row of source {unknown!r}, which the corpus manifest does not name")
        return found.to_numpy().astype(np.int64)


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


def row_hashes(pair_ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """(rows,) uint64: XXH3-64 of (seed, pair_id); the order of rows wherever arrival must not decide."""
    hash_of = xxhash.xxh3_64_intdigest
    return np.fromiter((hash_of(pair_id.encode(), seed) for pair_id in pair_ids.to_pylist()), np.uint64, len(pair_ids))
