"""The batch strategies, one row each: limits of a batch, groups inside it, and rows that move together.

strategy        stratum   groups                                   what moves together
cluster         source    its clusters                             a run (consecutive rows, one read)
group           source    the user's own segments of it            a run
source          source    the source (in a pool: each source)      a run of a layout made for it, otherwise a row
random          corpus    one: all of it                           a run of a layout made for it, otherwise a row
random_groups   source    as large as its clusters, of any rows    a row
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clusterbatch.config import BatchesConfig
from clusterbatch.shards.index import ClusterIndex

GroupsOf = Callable[[ClusterIndex, np.ndarray, BatchesConfig], np.ndarray]


class Strategy(NamedTuple):
    """One row of the table above. The plan itself knows strata and groups (strata.py), and no strategy."""

    groups: GroupsOf | None = None
    """(index, (p,) pieces of a stratum, configuration) -> (p,) integers: which pieces are one group.

    Groups are packed in the order of these numbers, inside each source. None: one group, or one for each source.
    """

    by_source: bool = True
    """True if batches stay inside a source, false if inside the corpus."""

    layouts: tuple[str, ...] = ()
    """Layouts of shards that can serve it, best first; empty: any. Its price in a comparison follows from them."""

    scattered: bool = False
    """True if the members of a group are drawn from all over the stratum: groups of the same sizes without meaning."""

    @property
    def needs_clusters(self) -> bool:
        """True if a corpus has to be embedded and clustered for it."""
        return "cluster" in self.layouts

    def moves_runs(self, name: str, layout: str) -> bool:
        """Return whether rows move in the runs of the layout, which are read at once, or one by one."""
        return not self.scattered and (self.groups is not None or name == layout)


def clusters_of(index: ClusterIndex, pieces: np.ndarray, config: BatchesConfig) -> np.ndarray:
    """Return (p,) int32, the clusters, whose numbers follow the packing order inside each source."""
    return index.cluster[pieces] // config.merged_clusters


# With cluster.column the clusters are the user's own groups.
_BY_CLUSTER = ("cluster", "group")

STRATEGIES = {
    "random": Strategy(by_source=False),
    "source": Strategy(),
    "cluster": Strategy(clusters_of, layouts=_BY_CLUSTER),
    "group": Strategy(clusters_of, layouts=("group",)),
    "random_groups": Strategy(clusters_of, layouts=_BY_CLUSTER, scattered=True),
}
