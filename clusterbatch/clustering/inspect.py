"""Looking at finished clusters, one at a time or all of a source."""

from __future__ import annotations

import math
from typing import Any

import pyarrow.compute as pc

from clusterbatch.clustering.statistics import STATISTICS
from clusterbatch.config import RunConfig
from clusterbatch.errors import UsageError
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace


def inspect_cluster(config: RunConfig, source: str, cluster: int, *, generation: int = 0) -> dict[str, Any]:
    """All that is known of a cluster: rows, mean_cosine, duplicate_share, mean_characters, terms (that name it),
    neighbours (nearest clusters with cosine), near and far (example rows), remarks. Cosines are None where rows were
    not clustered by vectors.

    Raises UsageError where there is no such source or cluster, DataError where clustering is not finished.
    """
    rows = inspect_source(config, source, generation=generation)
    found = [row for row in rows if row["cluster"] == cluster]
    if not found:
        raise UsageError(f"{source}/{cluster}: no such cluster; {source} has {len(rows)}, numbered from 0")
    return found[0]


def inspect_source(config: RunConfig, source: str, *, generation: int = 0) -> list[dict[str, Any]]:
    """The same for all clusters of a source, in packing order."""
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
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
