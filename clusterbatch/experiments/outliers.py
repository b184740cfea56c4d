"""The rows that belong least to where they are: farthest from their centroid, set aside or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clusterbatch.clustering.reducing import OUTLIERS
from clusterbatch.clustering.shards import ROWS
from clusterbatch.experiments.clusterviews import excerpt
from clusterbatch.store import Artifact, Manifest
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
