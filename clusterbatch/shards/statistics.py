"""Description of finished clusters, one at a time or all of a source.

It gives sizes, cohesion, neighbours, names, examples, and what looks like junk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import RunConfig
from clusterbatch.embedding.vectors import vector_values
from clusterbatch.errors import UsageError
from clusterbatch.shards.cluster_facts import EXAMPLE, EXAMPLES, naming_terms
from clusterbatch.store import Artifact, Part
from clusterbatch.store.details import SourceClusters
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace

STATISTICS, FARTHEST = "statistics", "farthest"
_NEIGHBOURS = 3
# Clusters that are compared at once, and with how many before and behind them in the packing order, in which clusters
# of similar meaning are near each other: all pairs of a million clusters would take hours.
_BLOCK, _WINDOW = 1024, 16_384
# Rows listed of each source as the farthest from any centroid.
_FARTHEST = 100
# A cluster with a larger share of repeated documents, or this many standard deviations less cohesive than its source's
# clusters are, gets a remark.
_DUPLICATES, _DEVIATIONS = 0.5, 2.5


@dataclass(frozen=True)
class StatisticsJob:
    """facts: one part per bucket; keys: for each part, (source, cluster) of its rows, a source's rows together."""

    artifact: Artifact
    facts: Sequence[Part]
    keys: Sequence[Sequence[tuple[str, int]]]
    output: Artifact

    def run(self) -> tuple[list[Part], dict[str, SourceClusters]]:
        """Write one row per cluster and the farthest rows; return both parts and a summary of each source.

        Works source by source: of earlier ones only tables are held.
        """
        rows, farthest, summary = [_STATISTICS.empty_table()], [_FARTHEST_ROWS.empty_table()], {}
        for source, of_source in groupby(self._facts(), key=lambda fact: fact[0]):
            clusters: dict[int, list[dict[str, Any]]] = {}
            vectors: dict[int, np.ndarray] = {}
            for _, cluster, row, vector in of_source:
                clusters.setdefault(cluster, []).append(row)
                if vector is not None:
                    vectors[cluster] = vectors.get(cluster, 0) + vector.astype(np.float64)
            assert source not in summary, "the rows of a source are consecutive"
            described = _describe(source, clusters, vectors)
            rows.append(pa.Table.from_pylist(described, schema=_STATISTICS))
            farthest.append(pa.Table.from_pylist(_farthest(described), schema=_FARTHEST_ROWS))
            summary[source] = summarise(np.array([row["rows"] for row in described]), described)
        parts = [
            write_parquet(self.output, name, pa.concat_tables(tables), content=name)
            for name, tables in ((STATISTICS, rows), (FARTHEST, farthest))
        ]
        return parts, summary

    def _facts(self) -> Iterator[tuple[str, int, dict[str, Any], np.ndarray | None]]:
        """Yield (source, cluster, its bucket's facts, sum of its vectors or None) of every piece, in order."""
        for part, keys in zip(self.facts, self.keys, strict=True):
            table = read_parquet(self.artifact.folder, part)
            vectors: Iterable[np.ndarray | None] = repeat(None, len(keys))
            if "vector" in table.column_names:
                vectors = vector_values(table["vector"])
                table = table.drop_columns("vector")
            for (source, cluster), row, vector in zip(keys, table.to_pylist(), vectors, strict=True):
                yield source, cluster, row, vector


def summarise(sizes: np.ndarray, described: Sequence[dict[str, Any]]) -> SourceClusters:
    """Summarise one source's clusters: sizes (k,) in rows, and their descriptions in the same order.

    histogram: clusters by the power of two that their rows reach.
    """
    powers, counts = np.unique(np.floor(np.log2(sizes)).astype(int), return_counts=True)
    cosines = np.array([row["mean_cosine"] for row in described])
    return {
        "rows": int(sizes.sum()),
        "clusters": len(sizes),
        "largest": int(sizes.max()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "gini": round(gini(sizes), 4),
        "histogram": {str(2**power): int(count) for power, count in zip(powers.tolist(), counts, strict=True)},
        "mean_cosine": None if np.isnan(cosines).any() else round(float(np.average(cosines, weights=sizes)), 5),
        "remarks": sum(bool(row["remarks"]) for row in described),
    }


def gini(sizes: np.ndarray) -> float:
    """Return the Gini coefficient of (k,) sizes: 0 if all are equal, towards 1 if one cluster has everything."""
    ordered = np.sort(sizes).astype(float)
    count = len(ordered)
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * ordered.sum()))


def _describe(
    source: str, clusters: dict[int, list[dict[str, Any]]], vectors: dict[int, np.ndarray]
) -> list[dict[str, Any]]:
    numbers = sorted(clusters)
    pieces = [clusters[number] for number in numbers]
    # A cluster that is spread over several buckets is named by what its first piece says.
    terms = naming_terms([found[0]["terms"] for found in pieces], [found[0]["counts"] for found in pieces])
    neighbours: list[list[dict[str, Any]]] = [[] for _ in numbers]
    if vectors and len(numbers) > 1:
        neighbours = _neighbours(numbers, unit_length(np.array([vectors[number] for number in numbers])))
    rows = []
    for place, (number, found) in enumerate(zip(numbers, pieces, strict=True)):
        size = sum(piece["rows"] for piece in found)
        near = sorted((row for piece in found for row in piece["near"]), key=lambda row: -row["cosine"])
        far = sorted((row for piece in found for row in piece["far"]), key=lambda row: row["cosine"])
        rows.append(
            {
                "source": source,
                "cluster": number,
                "rows": size,
                "mean_cosine": sum(piece["cosine"] for piece in found) / size,
                "duplicate_share": sum(piece["duplicates"] for piece in found) / size,
                "mean_characters": sum(piece["characters"] for piece in found) / size,
                "terms": terms[place],
                "neighbours": neighbours[place],
                "near": near[:EXAMPLES],
                "far": far[:EXAMPLES],
            }
        )
    _remark(rows)
    return rows


def _remark(rows: list[dict[str, Any]]) -> None:
    """Add `remarks`: why a cluster may hold junk."""
    cosines = np.array([row["mean_cosine"] for row in rows])
    limit = cosines.mean() - _DEVIATIONS * cosines.std() if len(rows) >= 8 else -np.inf
    for row in rows:
        remarks = []
        if row["duplicate_share"] > _DUPLICATES:
            remarks.append(f"{row['duplicate_share']:.0%} of its documents repeat others")
        if row["mean_cosine"] < limit:
            remarks.append("its rows have little in common")
        row["remarks"] = remarks


def _neighbours(numbers: Sequence[int], centroids: np.ndarray) -> list[list[dict[str, Any]]]:
    """The nearest other clusters of each, by the cosine of their mean vectors; both arguments are in packing order."""
    centroids = centroids.astype(np.float32)
    found: list[list[dict[str, Any]]] = []
    for start in range(0, len(centroids), _BLOCK):
        first = max(0, start - _WINDOW)
        others = centroids[first : start + _BLOCK + _WINDOW]
        similarity = centroids[start : start + _BLOCK] @ others.T
        own = np.arange(len(similarity))
        similarity[own, start - first + own] = -np.inf
        count = min(_NEIGHBOURS, len(others) - 1)
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        for row, places in zip(similarity, nearest, strict=True):
            ordered = places[np.lexsort((places, -row[places]))].tolist()
            found.append([{"cluster": numbers[first + place], "cosine": float(row[place])} for place in ordered])
    return found


def _farthest(described: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{"source": row["source"], "cluster": row["cluster"], **far} for row in described for far in row["far"]]
    return sorted((row for row in rows if not np.isnan(row["cosine"])), key=lambda row: row["cosine"])[:_FARTHEST]


_NEIGHBOUR = pa.struct([pa.field("cluster", pa.int32()), pa.field("cosine", pa.float32())])
_STATISTICS = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("cluster", pa.int32()),
        pa.field("rows", pa.int64()),
        pa.field("mean_cosine", pa.float32()),
        pa.field("duplicate_share", pa.float32()),
        pa.field("mean_characters", pa.float32()),
        pa.field("terms", pa.list_(pa.string())),
        pa.field("neighbours", pa.list_(_NEIGHBOUR)),
        pa.field("near", pa.list_(EXAMPLE)),
        pa.field("far", pa.list_(EXAMPLE)),
        pa.field("remarks", pa.list_(pa.string())),
    ]
)
_FARTHEST_ROWS = pa.schema([pa.field("source", pa.string()), pa.field("cluster", pa.int32()), *EXAMPLE])


def inspect_cluster(config: RunConfig, source: str, cluster: int, *, generation: int = 0) -> dict[str, Any]:
    """Describe a cluster.

    Keys: rows, mean_cosine, duplicate_share, mean_characters, terms (that name it), neighbours (nearest clusters with
    cosine), near and far (example rows), remarks. Cosines are None if rows were not clustered by vectors.

    Raises UsageError if there is no such source or cluster, DataError if clustering is not finished.
    """
    rows = inspect_source(config, source, generation=generation)
    found = [row for row in rows if row["cluster"] == cluster]
    if not found:
        raise UsageError(f"{source}/{cluster}: no such cluster; {source} has {len(rows)}, numbered from 0")
    return found[0]


def inspect_source(config: RunConfig, source: str, *, generation: int = 0) -> list[dict[str, Any]]:
    """Describe all clusters of a source, in packing order, as `inspect_cluster` does one."""
    artifact = Workspace(config).clusters(generation)
    manifest = artifact.require()
    part = next(part for part in manifest.parts if part.details.get("content") == STATISTICS)
    table = read_parquet(artifact.folder, part)
    rows = [_without_nan(row) for row in table.filter(pc.equal(table["source"], source)).to_pylist()]
    if not rows:
        known = sorted(set(table["source"].to_pylist()))
        raise UsageError(f"{source}: no such source here; there are {', '.join(known[:20])}")
    return rows


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
