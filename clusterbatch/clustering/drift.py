"""Drift of a corpus since its clusters were made, measured on a sample: the figures, without Ray.

A company is the rows of one old cluster. In the space of the new vectors, each row is assigned to the company with the
nearest mean. A sample gives a company's mean only roughly, so some rows leave theirs by chance alone: the same
measurement in the old space says how many, and drift is the excess.

Legend: N sampled rows of one group, K old clusters, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score

# Clusters whose rows mutual information is computed over: its adjustment for chance takes their number squared.
_MOST_CLUSTERS = 512
# Rows whose similarities to all companies are in memory at once.
_BLOCK = 2048


@dataclass(frozen=True)
class GroupDrift:
    """Figures of one group's sampled rows.

    moved: share that leaves its cluster; by_chance: share that would if nothing had changed; mutual_information:
    adjusted, between old clusters and nearest companies (1: no row moves); movement: 1 - cosine between a cluster's
    means before and after, by rows; hardness_before, hardness_after: mean cosine of a query with the other documents of
    its cluster in the new space, which is what in-batch negatives will be like.
    """

    rows: int
    clusters: int
    moved: float
    by_chance: float
    mutual_information: float
    movement: float
    hardness_before: float
    hardness_after: float


def group_drift(
    label: np.ndarray, old: np.ndarray, new: np.ndarray, query: np.ndarray, document: np.ndarray
) -> GroupDrift | None:
    """Return the figures of one group's sample; None if fewer than two clusters have two rows.

    label: (N,) old cluster; old, new: (N, D) unit vectors that were and would be clustered, of any two spaces; query,
    document: (N, D) unit vectors of the new space.
    """
    present, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    # A row that is alone has no company whose mean it could be compared with.
    usable = np.flatnonzero(counts[label] >= 2)
    if np.count_nonzero(counts >= 2) < 2:
        return None
    old, new, query, document = (values[usable].astype(np.float32) for values in (old, new, query, document))
    _, label = np.unique(label[usable], return_inverse=True)
    chance, after = nearest_company(old, label), nearest_company(new, label)
    some = label < _MOST_CLUSTERS
    return GroupDrift(
        rows=len(label),
        clusters=len(present),
        moved=float(np.mean(after != label)),
        by_chance=float(np.mean(chance != label)),
        mutual_information=float(adjusted_mutual_info_score(label[some], after[some])),
        movement=_movement(new, label, after),
        hardness_before=hardness(query, document, label),
        hardness_after=hardness(query, document, after),
    )


def merge_drifts(drifts: Sequence[GroupDrift]) -> dict[str, Any]:
    """The figures of all groups by rows, and what `refresh.when` asks for: drift, the share of rows that change
    clusters beyond chance; movement; hardness, what new clusters would add to it. All zero without any group."""
    rows = np.array([each.rows for each in drifts], float)
    names = [name for name in GroupDrift.__annotations__ if name not in ("rows", "clusters")]
    mean = {
        name: float(np.average([asdict(each)[name] for each in drifts], weights=rows)) if drifts else 0.0
        for name in names
    }
    chance = mean["by_chance"]
    return {
        "rows": int(rows.sum()),
        "clusters": sum(each.clusters for each in drifts),
        **{name: round(value, 5) for name, value in mean.items()},
        "drift": round(max(0.0, mean["moved"] - chance) / max(1e-9, 1 - chance), 5),
        "hardness": round(mean["hardness_after"] - mean["hardness_before"], 5),
    }


def nearest_company(vectors: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(N,) the label whose other rows' mean is nearest to each row; label: (N,) in [0, K), each at least twice.

    A row does not count for its own label's mean: of a few sampled rows it would be a large part.
    """
    sums = _sums(vectors, label)
    means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    nearest = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        rows, own = vectors[start : start + _BLOCK], label[start : start + _BLOCK]
        similarity = rows @ means.T
        others = sums[own] - rows
        others /= np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-9)
        similarity[np.arange(len(rows)), own] = np.einsum("nd,nd->n", rows, others)
        nearest[start : start + _BLOCK] = similarity.argmax(axis=1)
    return nearest


def hardness(query: np.ndarray, document: np.ndarray, label: np.ndarray) -> float:
    """Mean cosine of (N, D) queries with the documents of the other rows of their label; single rows do not count."""
    counts = np.bincount(label)[label]
    sums = _sums(document, label)
    own = np.einsum("nd,nd->n", query, document)
    total = np.einsum("nd,nd->n", query, sums[label]) - own
    together = counts >= 2
    return float(np.mean(total[together] / (counts[together] - 1))) if together.any() else 0.0


def _movement(vectors: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    clusters = int(before.max()) + 1
    one, other = _sums(vectors, before), np.zeros((clusters, vectors.shape[1]), np.float32)
    np.add.at(other, after, vectors)
    rows = np.bincount(before, minlength=clusters)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    # Of a cluster that all rows leave nothing remains to be compared.
    kept = lengths > 1e-9
    cosine = np.einsum("kd,kd->k", one, other)[kept] / lengths[kept]
    return float(np.average(1 - cosine, weights=rows[kept])) if kept.any() else 1.0


def _sums(vectors: np.ndarray, label: np.ndarray) -> np.ndarray:
    sums = np.zeros((int(label.max()) + 1, vectors.shape[1]), np.float32)
    np.add.at(sums, label, vectors)
    return sums
