"""What is clustered by itself: each source, or the corpus as a whole; and into how many clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Manifest

# The name in the cluster index of what is not separated by source.
WHOLE_CORPUS = "(all)"
# `auto`: clusters of this many global batches, so that about an eighth of the rows is packed with neighbours' rows.
_AUTO_BATCHES = 4


@dataclass(frozen=True)
class Groups:
    """names: sorted; rows: (G,) rows of each; clusters: (G,) how many clusters each is to be split into."""

    names: list[str]
    rows: np.ndarray
    clusters: np.ndarray

    @property
    def first_cluster(self) -> np.ndarray:
        """(G + 1,) int64: clusters of all groups are numbered through, group g's begin here."""
        return np.concatenate([[0], np.cumsum(self.clusters)])

    def of_rows(self, source: pa.ChunkedArray) -> np.ndarray:
        """(rows,) int64: the group of each row, by its source."""
        if self.names == [WHOLE_CORPUS]:
            return np.zeros(len(source), np.int64)
        found = pc.index_in(source, pa.array(self.names))
        if found.null_count:
            unknown = pc.filter(source, pc.is_null(found))[0].as_py()
            raise DataError(f"corpus: a row of source {unknown!r}, which the corpus manifest does not name")
        return found.to_numpy().astype(np.int64)


def groups_of(config: RunConfig, corpus: Manifest) -> Groups:
    """The groups of a corpus under this configuration."""
    sources: dict[str, int] = corpus.details["sources"]
    stratify = config.batches.stratify
    if stratify == "random" or (stratify != "source" and config.cluster.scope == "corpus"):
        sources = {WHOLE_CORPUS: sum(sources.values())}
    names = sorted(name for name, rows in sources.items() if rows)
    rows = np.array([sources[name] for name in names], np.int64)
    if stratify in ("random", "source"):
        clusters = np.ones(len(names), np.int64)
    elif config.cluster.clusters is not None:
        clusters = np.minimum(config.cluster.clusters, rows)
    else:
        clusters = np.maximum(1, np.round(rows / mean_size(config))).astype(np.int64)
    return Groups(names, rows, clusters)


def mean_size(config: RunConfig) -> int:
    """Rows per cluster that the number of clusters follows from: `cluster.mean_size`, else four global batches."""
    return config.cluster.mean_size or _AUTO_BATCHES * config.batches.size


def row_hashes(pair_ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """(rows,) uint64: XXH3-64 of (seed, pair_id); the order of rows wherever arrival must not decide."""
    hash_of = xxhash.xxh3_64_intdigest
    return np.fromiter((hash_of(pair_id.encode(), seed) for pair_id in pair_ids.to_pylist()), np.uint64, len(pair_ids))
