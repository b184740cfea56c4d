"""What clusters and batches look like to a person: examples of batches, terms of clusters, a map of the centroids.

The rows that belong least to where they are: farthest from their centroid, set aside or not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from clusterbatch.batches.curriculum import Plan
from clusterbatch.corpus.images import readable
from clusterbatch.evaluation.bm25 import words
from clusterbatch.shards.index import ClusterIndex
from clusterbatch.shards.reader import ROWS, read_index
from clusterbatch.shards.reduce import OUTLIERS
from clusterbatch.store import Artifact, Manifest, Part
from clusterbatch.store.tables import read_parquet

_SHOWN = 10


@dataclass(frozen=True)
class Outlier:
    """cosine: to its centroid; set_aside: whether training never sees it."""

    source: str
    query: str
    document: str
    cosine: float
    set_aside: bool


def outliers(artifact: Artifact, manifest: Manifest) -> list[Outlier]:
    """The farthest rows of clusters that were made by vectors, the farthest first. Reads one column, and their text."""
    found: list[tuple[float, str, int, bool]] = []
    for part in manifest.parts:
        if part.details.get("content") not in (ROWS, OUTLIERS):
            continue
        cosine = read_parquet(artifact.folder, part.path, ["cosine"])["cosine"].to_numpy()
        # Rows of sources that were not split have none.
        known = np.flatnonzero(np.isfinite(cosine))
        farthest = known[np.argsort(cosine[known], kind="stable")[:_SHOWN]].tolist()
        aside = part.details["content"] == OUTLIERS
        found = sorted([*found, *((float(cosine[row]), part.path, row, aside) for row in farthest)])[:_SHOWN]
    shown = []
    for cosine_of_row, path, row, aside in found:
        text = read_parquet(artifact.folder, path, ["source", "query", "document"]).slice(row, 1).to_pylist()[0]
        query, document = excerpt(text["query"]), excerpt(text["document"])
        shown.append(Outlier(text["source"], query, document, cosine_of_row, aside))
    return shown


_EXCERPT = 160
# Clusters on the map, the largest first, and rows of each whose words are counted.
_MAPPED = 300
_ROWS_OF_CLUSTER = 64
_TERMS = 5
# Words of at least so many characters; shorter ones are seldom what a cluster is about. Character pairs of Japanese
# count as they are.
_SHORTEST = 4


class ShardText:
    """Text of single rows of the shards; row groups are kept while they are asked for."""

    def __init__(self, artifact: Artifact, manifest: Manifest) -> None:
        self._artifact = artifact
        self._parts: dict[int, Part] = {
            part.details["shard"]: part for part in manifest.parts if part.details.get("content") == ROWS
        }
        self._group = lru_cache(maxsize=8)(self._read_group)

    def rows(self, shard: int, first: int, rows: int) -> pa.Table:
        """Up to `rows` consecutive rows, all from the row group of the first: pair_id, query, document, source."""
        group = 0
        for size in self._parts[shard].details["row_groups"]:
            if first < size:
                return self._group(shard, group).slice(first, rows)
            first, group = first - size, group + 1
        raise AssertionError(f"shard {shard} has no such row")

    def _read_group(self, shard: int, group: int) -> pa.Table:
        columns = ["pair_id", "query", "document", "source"]
        return read_parquet(self._artifact.folder, self._parts[shard], columns, [group])


@dataclass(frozen=True)
class Example:
    """Some pairs of one global batch, shortened for reading."""

    arm: str
    purity: float
    step: int
    pairs: list[dict[str, str]]


def batch_example(arm: str, plan: Plan, text: ShardText, pairs: int = 6) -> Example:
    """Evenly spaced pairs of the batch in the middle of the first epoch."""
    step = plan.steps_per_epoch // 2
    batch = plan.batch(step)
    shown = []
    for position in np.unique(np.linspace(0, len(batch) - 1, pairs).astype(int)):
        piece = batch.piece[position]
        row = int(plan.index.first_row[piece] + batch.row[position])
        found = text.rows(int(plan.index.shard[piece]), row, 1).to_pylist()[0]
        shown.append(
            {"query": excerpt(found["query"]), "document": excerpt(found["document"]), "source": found["source"]}
        )
    return Example(arm, batch.purity, step, shown)


@dataclass(frozen=True)
class MappedCluster:
    """x, y: the centroid on the two main axes of all centroids; terms: its most telling words."""

    source: str
    cluster: int
    rows: int
    x: float
    y: float
    terms: list[str]


def cluster_map(artifact: Artifact, manifest: Manifest) -> list[MappedCluster]:
    """The largest clusters of the sources that were split. Distances on two axes are rough; the terms say more."""
    index = read_index(artifact, manifest)
    sizes = _sizes(index)
    centroids: dict[tuple[str, int], np.ndarray] = {}
    for part in manifest.parts:
        if part.details.get("content") == "centroids":
            column = read_parquet(artifact.folder, part, ["centroid"])["centroid"].combine_chunks()
            for cluster, centroid in enumerate(column.values.to_numpy().reshape(len(column), -1)):
                centroids[part.details["group"], cluster] = centroid
    shown = sorted((key for key in centroids if key in sizes), key=lambda key: (-sizes[key][0], key))[:_MAPPED]
    if len(shown) < 3:
        return []
    positions = _two_axes(np.stack([centroids[key] for key in shown]))
    terms = _terms(ShardText(artifact, manifest), index, [sizes[key][1] for key in shown])
    return [
        MappedCluster(source, cluster, sizes[source, cluster][0], float(x), float(y), found)
        for (source, cluster), (x, y), found in zip(shown, positions, terms, strict=True)
    ]


def cluster_rows(artifact: Artifact, manifest: Manifest) -> list[int]:
    """Rows of every cluster."""
    return [rows for rows, _ in _sizes(read_index(artifact, manifest)).values()]


def _sizes(index: ClusterIndex) -> dict[tuple[str, int], tuple[int, int]]:
    """Rows and first piece by (source, cluster)."""
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    for piece in range(len(index)):
        key = (index.sources[index.source[piece]], int(index.cluster[piece]))
        rows, first = sizes.get(key, (0, piece))
        sizes[key] = (rows + int(index.rows[piece]), first)
    return sizes


def _two_axes(vectors: np.ndarray) -> np.ndarray:
    """(k, 2): principal components of (k, d) vectors."""
    centred = vectors.astype(np.float64) - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    found: np.ndarray = centred @ axes[:2].T
    return found


def _terms(text: ShardText, index: ClusterIndex, pieces: Sequence[int]) -> list[list[str]]:
    """For each piece the words that are frequent in it and rare in the others (tf-idf over clusters)."""
    counts = []
    for piece in pieces:
        table = text.rows(
            int(index.shard[piece]), int(index.first_row[piece]), min(_ROWS_OF_CLUSTER, int(index.rows[piece]))
        )
        rows = [
            set(words(query)) | set(words(document[:1000]))
            for query, document in zip(table["query"].to_pylist(), table["document"].to_pylist(), strict=True)
        ]
        counts.append(Counter(word for row in rows for word in row if len(word) >= _SHORTEST or not word.isascii()))
    clusters_with = Counter(word for count in counts for word, rows in count.items() if rows > 1)
    found = []
    for count in counts:
        weight = {w: rows * math.log(len(counts) / max(1, clusters_with[w])) for w, rows in count.items() if rows > 1}
        found.append(sorted(weight, key=lambda word: (-weight[word], word))[:_TERMS])
    return found


def excerpt(text: str) -> str:
    """On one line, cut to what a table cell can hold."""
    flat = " ".join(readable(text, len(text)).split())
    return flat if len(flat) <= _EXCERPT else flat[: _EXCERPT - 1] + "…"
