"""Views of batches and clusters for people: examples of batches, the largest clusters on a map, the farthest rows.

Numbers of clusters are those of the index, as `inspect --cluster` takes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.batches.curriculum import Plan
from clusterbatch.config import ClusterConfig
from clusterbatch.corpus.images import readable
from clusterbatch.shards.cluster_means import cluster_means
from clusterbatch.shards.reader import ROWS
from clusterbatch.shards.semantic_duplicates import DUPLICATES
from clusterbatch.shards.shuffle_reduce import OUTLIERS
from clusterbatch.shards.statistics import FARTHEST, STATISTICS
from clusterbatch.store import Artifact, Manifest, Part
from clusterbatch.store.tables import read_parquet

_SHOWN = 10
_EXCERPT = 160
# Pairs of semantic duplicates that are shown of each source, and of all.
_PAIRS, _MOST_PAIRS = 3, 30
# Clusters on the map, the largest first, and the words that are shown of each.
_MAPPED, _TERMS = 300, 5


@dataclass(frozen=True)
class Outlier:
    """cosine: to its centroid; set_aside: whether training never sees it."""

    source: str
    query: str
    document: str
    cosine: float
    set_aside: bool


def outliers(artifact: Artifact, manifest: Manifest) -> list[Outlier]:
    """Return the rows farthest from their centroids, the farthest first, of clusters that were made by vectors.

    Rows of the clusters are those that the cluster stage has stored; of rows set aside one column is read.
    """
    stored = _content(artifact, manifest, FARTHEST)
    rows = [] if stored is None else [{**row, "aside": False} for row in stored.to_pylist()]
    for part in manifest.parts:
        if part.details.get("content") != OUTLIERS:
            continue
        cosine = read_parquet(artifact.folder, part, ["cosine"])["cosine"].to_numpy()
        known = np.flatnonzero(np.isfinite(cosine))
        chosen = known[np.argsort(cosine[known], kind="stable")[:_SHOWN]]
        if len(chosen):
            text = read_parquet(artifact.folder, part, ["source", "query", "document", "cosine"])
            rows += [{**row, "aside": True} for row in text.take(pa.array(chosen)).to_pylist()]
    rows.sort(key=lambda row: (row["cosine"], row["source"], row["query"]))
    return [
        Outlier(row["source"], excerpt(row["query"]), excerpt(row["document"]), row["cosine"], row["aside"])
        for row in rows[:_SHOWN]
    ]


def near_pairs(artifact: Artifact, manifest: Manifest) -> list[dict[str, Any]]:
    """Return some pairs of semantic duplicates of each source, excerpts of their texts; none if they were not sought.

    Keys: source, query_cosine, document_cosine, and query, document of both rows (`other_...`).
    """
    stored = _content(artifact, manifest, DUPLICATES)
    shown: dict[str, list[dict[str, Any]]] = {}
    for row in [] if stored is None else stored.to_pylist():
        of_source = shown.setdefault(row["source"], [])
        if len(of_source) < _PAIRS:
            texts = {key: excerpt(row[key]) for key in ("query", "document", "other_query", "other_document")}
            of_source.append({**row, **texts})
    return [row for of_source in shown.values() for row in of_source][:_MOST_PAIRS]


class ShardText:
    """Read text of single rows of the shards; keep the row groups read last."""

    def __init__(self, artifact: Artifact, manifest: Manifest) -> None:
        self._artifact = artifact
        self._parts: dict[int, Part] = {
            part.details["shard"]: part for part in manifest.parts if part.details.get("content") == ROWS
        }
        self._group = lru_cache(maxsize=8)(self._read_group)

    def rows(self, shard: int, first: int, rows: int) -> pa.Table:
        """Return up to `rows` consecutive rows of the first one's row group: pair_id, query, document, source."""
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
    purity: float | None
    step: int
    pairs: list[dict[str, str]]

    def title(self, words: Mapping[str, str]) -> str:
        """Return which batch it is, in the words of a report."""
        if self.purity is None:
            return words["batch_of_step"].format(arm=self.arm, step=self.step)
        return words["batch_of"].format(arm=self.arm, step=self.step, purity=f"{100 * self.purity:.0f} %")


def has_clusters(manifest: Manifest) -> bool:
    """Return whether the rows of these shards are grouped by more than their source."""
    return manifest.config["stratify"] not in ("source", "random")


def batch_example(
    arm: str, plan: Plan, text: ShardText, steps: int, *, clustered: bool = True, pairs: int = 6
) -> Example:
    """Return evenly spaced pairs of a batch that the run of `steps` trains on, from its middle.

    clustered: whether the rows of the plan have clusters.
    """
    step = steps // 2
    batch = plan.batch(step)
    shown = []
    for position in np.unique(np.linspace(0, len(batch) - 1, pairs).astype(int)):
        piece = batch.piece[position]
        row = int(plan.index.first_row[piece] + batch.row[position])
        found = text.rows(int(plan.index.shard[piece]), row, 1).to_pylist()[0]
        shown.append(
            {"query": excerpt(found["query"]), "document": excerpt(found["document"]), "source": found["source"]}
        )
    return Example(arm, batch.purity if clustered else None, step, shown)


@dataclass(frozen=True)
class MappedCluster:
    """x, y: the cluster's mean on the two main axes of all that are shown; terms: the words that name it."""

    source: str
    cluster: int
    rows: int
    x: float
    y: float
    terms: list[str]


def cluster_map(artifact: Artifact, manifest: Manifest, config: ClusterConfig) -> list[MappedCluster]:
    """Return the largest clusters of the sources that were split; none if there are fewer than three.

    Distances on two axes are rough; the terms say more.
    """
    table = _content(artifact, manifest, STATISTICS)
    if table is None:
        return []
    rows = table.select(["source", "cluster", "rows", "terms", "mean_cosine"]).to_pylist()
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["source"]] = counts.get(row["source"], 0) + 1
    split = [row for row in rows if counts[row["source"]] > 1 and not math.isnan(row["mean_cosine"])]
    split.sort(key=lambda row: (-row["rows"], row["source"], row["cluster"]))
    by_name = {(row["source"], row["cluster"]): row for row in split[:_MAPPED]}
    means = cluster_means(artifact, config, by_name.keys()) if len(by_name) >= 3 else None
    if means is None:
        return []
    places = dict(zip(means.names, _two_axes(means.vectors).tolist(), strict=True))
    found = []
    for (source, cluster), row in by_name.items():
        x, y = places[source, cluster]
        found.append(MappedCluster(source, cluster, row["rows"], x, y, row["terms"][:_TERMS]))
    return found


def cluster_rows(artifact: Artifact, manifest: Manifest) -> list[int]:
    """Return the rows of every cluster."""
    table = _content(artifact, manifest, STATISTICS)
    found: list[int] = [] if table is None else table["rows"].to_pylist()
    return found


def _content(artifact: Artifact, manifest: Manifest, content: str) -> pa.Table | None:
    """Return the table that the cluster stage stored under that name; None if there is none."""
    part = next((part for part in manifest.parts if part.details.get("content") == content), None)
    return None if part is None else read_parquet(artifact.folder, part)


def _two_axes(vectors: np.ndarray) -> np.ndarray:
    """Return the two principal components, (k, 2), of (k, d) vectors."""
    centred = vectors.astype(np.float64) - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    found: np.ndarray = centred @ axes[:2].T
    return found


def excerpt(text: str) -> str:
    """Return the text on one line, cut to what a table cell can hold."""
    flat = " ".join(readable(text, len(text)).split())
    return flat if len(flat) <= _EXCERPT else flat[: _EXCERPT - 1] + "…"
