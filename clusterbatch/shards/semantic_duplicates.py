"""Semantic duplicates among the rows of one cluster (SemDeDup, Abbas 2023, arXiv 2303.09540), by the surrogate.

Clusters make the search cheap: near rows are mostly in one cluster, and no two clusters are compared. Scores are made
tile by tile, so memory does not grow with the square of a cluster, and rows come in the order of their hashes, so the
result depends on neither workers nor arrival. A cluster larger than a shard is compared within each of its pieces.

Two rows are near if the cosine of their queries, or that of their documents, reaches the threshold; to be dropped, a
row must be near in both, for a document with two different queries is two lessons.

Legend: N rows of a cluster, R and C rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import DuplicatesConfig
from clusterbatch.embedding.vectors import SIDES, vector_values
from clusterbatch.shards.cluster_facts import CHARACTERS, readable
from clusterbatch.store.details import SemanticDuplicates

# Rows and columns of a tile: 8 MiB of scores for each side, in a cache's reach.
_ROWS, _COLUMNS = 512, 4096
# Links between groups that are kept before they are resolved.
_MOST_LINKS = 2**20
# Of unit vectors in float32: equal ones must reach a threshold of 1.
_ROUNDING = 1e-5


# Examples of each source that a bucket gives, and that are kept of all.
_EXAMPLES, EXAMPLES = 5, 20
# Content of the part with the examples.
DUPLICATES = "duplicates"
EXAMPLE = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("query_cosine", pa.float32()),
        pa.field("document_cosine", pa.float32()),
        *(pa.field(name, pa.string()) for name in ("pair_id", "query", "document")),
        *(pa.field(f"other_{name}", pa.string()) for name in ("pair_id", "query", "document")),
    ]
)


@dataclass(frozen=True)
class Found:
    """Semantic duplicates among N rows of several clusters.

    first: (N,) int64, the first row of each row's group; rank: (N,) int64, how many rows of the group come before it;
    counts: by source; examples: rows of EXAMPLE, some near pairs of each source with the lowest cosines.
    """

    first: np.ndarray
    rank: np.ndarray
    counts: dict[str, SemanticDuplicates]
    examples: list[dict[str, Any]]


def find_duplicates(table: pa.Table, source_of: Callable[[int], str], config: DuplicatesConfig) -> Found:
    """Look for semantic duplicates within each cluster.

    table: rows sorted by `cluster` and `part`, with vectors of both sides; source_of: the source of a cluster. If they
    are to be dropped, a group is a row that stays and those that repeat it, whose rank is 1.
    """
    assert config.threshold is not None
    cluster, part = table["cluster"].to_numpy(), table["part"].to_numpy()
    first, rank = np.arange(len(cluster)), np.zeros(len(cluster), np.int64)
    counts: dict[str, SemanticDuplicates] = {}
    shown: dict[str, list[tuple[float, int, int]]] = {}
    changes = (np.diff(cluster, prepend=-1) != 0) | (np.diff(part, prepend=-1) != 0)
    for start, stop in pairwise([*np.flatnonzero(changes).tolist(), len(cluster)]):
        query, document = _unit_vectors(table.slice(start, stop - start))
        source = source_of(int(cluster[start]))
        if config.action == "drop":
            near = dropped_rows(query, document, config.threshold, _EXAMPLES)
        else:
            near = near_rows(query, document, config.threshold, _EXAMPLES)
        first[start:stop] = near.group + start
        rank[start:stop] = near.rank.clip(max=1) if config.action == "drop" else near.rank
        sizes = np.bincount(near.group)
        sizes = sizes[sizes > 1]
        of_source = counts.setdefault(source, SemanticDuplicates(groups=0, rows=0, pairs=0, dropped=0))
        of_source["groups"] += len(sizes)
        of_source["rows"] += int(sizes.sum())
        of_source["pairs"] += near.pairs
        of_source["dropped"] += int((sizes - 1).sum()) if config.action == "drop" else 0
        found = [(cosine, int(row) + start, int(other) + start) for cosine, row, other in near.lowest.tolist()]
        shown[source] = sorted([*shown.get(source, []), *found])[:_EXAMPLES]
    examples = [_example(table, source, *pair) for source, pairs in shown.items() for _, *pair in pairs]
    return Found(first, rank, counts, examples)


def lowest_examples(examples: Iterable[dict[str, Any]]) -> pa.Table:
    """Return a table of EXAMPLE with the pairs of lowest cosines of each source."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        by_source.setdefault(example["source"], []).append(example)

    def order(example: dict[str, Any]) -> tuple[float, str, str]:
        return max(example["query_cosine"], example["document_cosine"]), example["pair_id"], example["other_pair_id"]

    kept = [example for source in sorted(by_source) for example in sorted(by_source[source], key=order)[:EXAMPLES]]
    return pa.Table.from_pylist(kept, schema=EXAMPLE)


def _unit_vectors(rows: pa.Table) -> list[np.ndarray]:
    """Return the (rows, D) float32 unit vectors of queries and of documents."""
    return [unit_length(vector_values(rows[f"{side}_vector"]).astype(np.float32)) for side in SIDES]


def _example(table: pa.Table, source: str, row: int, other: int) -> dict[str, Any]:
    columns = table.select(["pair_id", *SIDES, *(f"{side}_vector" for side in SIDES)])
    # To take rows Arrow would make one piece of the texts of the bucket, which may be more than its offsets reach.
    both = pa.concat_tables([columns.slice(row, 1), columns.slice(other, 1)])
    cosines = {f"{name}_cosine": float(np.dot(*side)) for name, side in zip(SIDES, _unit_vectors(both), strict=True)}
    texts = both.select(["pair_id", *SIDES]).to_pylist()
    shown = [{**text, **{side: readable(text[side], CHARACTERS) for side in SIDES}} for text in texts]
    return {"source": source, **cosines, **shown[0], **{f"other_{name}": text for name, text in shown[1].items()}}


@dataclass(frozen=True)
class NearRows:
    """Near rows of a cluster.

    group: (N,) int64, the first row of each row's group, itself if it is alone: rows that are near, also by way of
    others, are one group; pairs: how many pairs are near; lowest: (n, 3) float64, cosine and rows of those of these
    pairs with the lowest cosines.
    """

    group: np.ndarray
    pairs: int
    lowest: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """(N,) int64, how many rows of its group come before each row."""
        order = np.argsort(self.group, kind="stable")
        starts = np.flatnonzero(np.diff(self.group[order], prepend=-1))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        return rank


def near_rows(query: np.ndarray, document: np.ndarray, threshold: float, examples: int = 0) -> NearRows:
    """Group the rows of a cluster that are near in query or document; both are (N, D) unit vectors, float32."""
    group = np.arange(len(query))
    links: list[np.ndarray] = []
    count = pairs = 0
    lowest = np.empty((0, 3))
    for row, column, cosine in _near_pairs(query, document, threshold):
        pairs += len(row)
        if examples:
            lowest = _lowest([lowest, np.stack([cosine, row, column], axis=1)], examples)
        ends = np.sort(np.stack([group[row], group[column]]), axis=0)
        links.append(np.unique(ends[:, ends[0] < ends[1]], axis=1))
        count += links[-1].shape[1]
        if count > _MOST_LINKS:
            group, links, count = _joined(group, links), [], 0
    return NearRows(_joined(group, links), pairs, lowest)


def dropped_rows(query: np.ndarray, document: np.ndarray, threshold: float, examples: int = 0) -> NearRows:
    """Group rows with the first one, itself of no earlier one's group, that they are near to in query and document.

    query, document: (N, D) unit vectors, float32. `pairs` are those of a row with the first of its group.
    """
    least = np.float32(threshold - _ROUNDING)
    repeated = np.full(len(query), -1, np.int64)
    kept = np.empty(0, np.int64)
    for start in range(0, len(query), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(query)))
        for first in range(0, len(kept), _COLUMNS):
            earlier, left = kept[first : first + _COLUMNS], rows[repeated[rows] < 0]
            near = _both(query, document, left, earlier) >= least
            found = near.any(1)
            repeated[left[found]] = earlier[near[found].argmax(1)]
        left = rows[repeated[rows] < 0]
        near = _both(query, document, left, left) >= least
        for place in np.flatnonzero(np.triu(near, 1).any(0)).tolist():
            before = np.flatnonzero(near[:place, place] & (repeated[left[:place]] < 0))
            if len(before):
                repeated[left[place]] = left[before[0]]
        kept = np.concatenate([kept, rows[repeated[rows] < 0]])
    row = np.flatnonzero(repeated >= 0)
    cosine = np.minimum(*((side[row] * side[repeated[row]]).sum(1) for side in (query, document)))
    lowest = _lowest([np.stack([cosine, repeated[row], row], axis=1)], examples)
    return NearRows(np.where(repeated < 0, np.arange(len(query)), repeated), len(row), lowest)


def _lowest(pairs: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return the `count` rows of (n, 3) `pairs` that come first by cosine, row and other row."""
    found = np.concatenate(pairs)
    return found[np.lexsort(found.T[::-1])[:count]]


def _near_pairs(
    query: np.ndarray, document: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows, later columns that are near them, and the higher cosine of each pair, tile by tile."""
    least = np.float32(threshold - _ROUNDING)
    for start in range(0, len(query), _ROWS):
        rows = slice(start, start + _ROWS)
        for first in range(start, len(query), _COLUMNS):
            columns = slice(first, first + _COLUMNS)
            cosine_RC = query[rows] @ query[columns].T
            np.maximum(cosine_RC, document[rows] @ document[columns].T, out=cosine_RC)
            row, column = np.nonzero(cosine_RC >= least)
            cosine = cosine_RC[row, column]
            row, column = row + start, column + first
            later = row < column
            if later.any():
                yield row[later], column[later], cosine[later]


def _both(query: np.ndarray, document: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return (R, C), the lower of the two cosines."""
    return np.minimum(query[rows] @ query[columns].T, document[rows] @ document[columns].T)


def _joined(group: np.ndarray, links: list[np.ndarray]) -> np.ndarray:
    """Return the groups with those that are linked made one; each is still named by its first row."""
    if not links:
        return group
    one, other = np.concatenate(links, axis=1)
    rows = len(group)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(rows, rows))
    number = connected_components(graph, directed=False)[1][group]
    first = np.full(number.max() + 1, rows)
    np.minimum.at(first, number, np.arange(rows))
    return first[number]
