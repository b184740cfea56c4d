"""Figures of batches of clusters, from a sample's vectors, and what they mean. No Ray, no training.

Pairs of rows are drawn uniformly by the sample, so means over pairs of one cluster (hardness, false negatives) are
those of the whole corpus, if the sample is cut into as many clusters as the corpus would be.

Legend: N rows of a group, C clusters, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import LocalRows

# Fewer sampled rows per cluster, and clusters would be of the sample's noise.
_LEAST_SAMPLED = 32
# Clusters of fewer batches than this get no credit, however hard their rows would be for each other: their batches
# repeat, and much of them is packed with what remains of others.
LEAST_BATCHES = 2
# Rows of a cluster that are scored with each other.
_MOST_SCORED = 512
# Tukey's fence: so many quartile distances below the lower quartile of the cosines to centroids.
_FENCE = 1.5
# What tells a gain from nothing, in nats of the expected loss, and when masks are needed, in shares of the negatives.
_HARDER, _FALSE = 0.1, 0.01
_DUPLICATES = 0.3
# Documents from this cosine on say nearly the same.
_NEARLY_EQUAL = 0.95


@dataclass(frozen=True)
class BatchFigures:
    """Figures of batches drawn from one kind of set.

    hardness: mean cosine of a query with the other documents; false_negatives: share of these that the surrogate scores
    as high as the query's own; masked: share that `mask_share` would leave out; difficulty: expected InfoNCE loss under
    the surrogate, in nats, masks applied; copies: number of other documents in a row's batch that nearly equal its own.
    """

    hardness: float
    false_negatives: float
    masked: float
    difficulty: float
    copies: float


@dataclass(frozen=True)
class Sample:
    """query, document: (N, D) unit vectors; query_hash, document_hash: (N,) of the texts."""

    query: np.ndarray
    document: np.ndarray
    query_hash: np.ndarray
    document_hash: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def take(self, rows: np.ndarray) -> Sample:
        return Sample(self.query[rows], self.document[rows], self.query_hash[rows], self.document_hash[rows])


def batch_figures(
    sample: Sample, label: np.ndarray, *, batch: int, temperature: float, mask_share: float, seed: int = 0
) -> BatchFigures:
    """Return the figures of batches of `batch` rows with one label each; label: (N,). Repeated texts are no negatives.

    difficulty is the mean over queries of log(1 + (batch - 1) mean_j exp((s_j - s) / temperature)), j over the other
    documents of the label that are not masked, s the score of the query's own.
    """
    random = np.random.default_rng(seed)
    sums = np.zeros(5)
    negatives = queries = 0.0
    for number in np.unique(label):
        rows = np.flatnonzero(label == number)
        size = len(rows)
        if size < 2:
            continue
        rows = random.choice(rows, _MOST_SCORED, replace=False) if size > _MOST_SCORED else rows
        part = sample.take(rows)
        scores = part.query.astype(np.float32) @ part.document.astype(np.float32).T
        own = np.diagonal(scores)[:, None]
        other = part.document_hash[:, None] != part.document_hash[None, :]
        other &= part.query_hash[:, None] != part.query_hash[None, :]
        masked = other & (scores > np.where(own > 0, mask_share * own, own))
        kept = other & ~masked
        copies = other & (part.document.astype(np.float32) @ part.document.astype(np.float32).T >= _NEARLY_EQUAL)
        mean = (np.exp((scores - own) / temperature) * kept).sum(axis=1) / np.maximum(other.sum(axis=1), 1)
        # Clusters count by their rows, whatever was scored of them.
        weight = size / len(rows)
        sums += weight * np.array(
            [
                (scores * other).sum(),
                (other & (scores >= own)).sum(),
                masked.sum(),
                np.log1p((batch - 1) * mean).sum(),
                (batch - 1) * (copies.sum(axis=1) / np.maximum(other.sum(axis=1), 1)).sum(),
            ]
        )
        negatives += weight * other.sum()
        queries += weight * len(rows)
    means = sums / np.array([max(negatives, 1)] * 3 + [max(queries, 1)] * 2)
    return BatchFigures(*means.tolist())


def predict_group(
    sample: Sample, rows: int, features: np.ndarray, sizes: Sequence[int], *, seed: int, batch: int, **batches: Any
) -> dict[str, Any]:
    """Return the figures of one source of `rows` rows, from its sample.

    features: (N, D) what would be clustered; `batch` and `batches`: of batch_figures. Returns diversity (1 - mean
    cosine of two of its documents), duplicates, outliers (shares), source (figures of batches of all of it), clusters
    (by size, a string; sizes that do not split it, are hardly larger than a batch or need more sample have no entry),
    below_batch and too_small (sizes for the batch and for the sample), and divisible: whether clusters of any size
    of two batches could split it.
    """
    order = np.random.default_rng(seed).permutation(len(sample))
    sample, features = sample.take(order), features[order].astype(np.float32)
    mean = sample.document.astype(np.float64).mean(axis=0)
    count, least_size = len(sample), LEAST_BATCHES * batch
    found: dict[str, Any] = {
        "rows": rows,
        "sampled": count,
        # Without the rows' cosine to themselves.
        "diversity": 1 - float((count * mean @ mean - 1) / max(count - 1, 1)),
        "duplicates": 1 - len(np.unique(sample.document_hash)) / count,
        "source": asdict(batch_figures(sample, np.zeros(count, int), batch=batch, **batches)),
        "clusters": {},
        "below_batch": [],
        "too_small": [],
        "divisible": round(rows / least_size) > 1,
        "outliers": 0.0,
    }
    for size in sorted(sizes, reverse=True):
        clusters = round(rows / size)
        if clusters < 2:
            continue
        if size < least_size:
            found["below_batch"].append(size)
            continue
        if count < _LEAST_SAMPLED * clusters:
            found["too_small"].append(size)
            continue
        centers = fit(LocalRows.of(features, clusters=clusters), FitSettings(clusters, seed=seed)).centers
        assigned = Assigner(centers.centroids)(features)
        figures = batch_figures(sample, assigned.labels.numpy(), batch=batch, **batches)
        found["clusters"][str(size)] = asdict(figures)
        low, high = np.quantile(assigned.cosine.numpy(), [0.25, 0.75])
        found["outliers"] = float(np.mean(assigned.cosine.numpy() < low - _FENCE * (high - low)))
    return found


def verdict_of(group: Mapping[str, Any]) -> tuple[str, float, str]:
    """Return (outcome, predicted gain in nats of difficulty, why) for one source.

    Outcomes: 'harder' (batches of clusters are), 'not harder', 'unsuitable' (no clusters to speak of, or copies) and
    'cannot tell'. Harder batches are no promise of a better model: that takes training (`compare`).
    """
    if not group["clusters"]:
        if group["too_small"]:
            return "cannot tell", 0.0, "the sample is too small for these cluster sizes (predict.rows)"
        if not group["below_batch"]:
            return "unsuitable", 0.0, "too few rows to be split"
        why = "clusters would be hardly larger than a batch"
        if group["divisible"]:
            return "cannot tell", 0.0, f"{why}; try larger ones (predict.sizes)"
        return "unsuitable", 0.0, why
    size, best = max(group["clusters"].items(), key=lambda entry: entry[1]["difficulty"])
    gain = best["difficulty"] - group["source"]["difficulty"]
    if group["duplicates"] > _DUPLICATES:
        why = f"{group['duplicates']:.0%} of its documents repeat others: remove duplicates first"
        return "unsuitable", gain, why
    if gain < _HARDER:
        return "not harder", gain, f"clusters are hardly harder than the source itself ({gain:+.2f} nats)"
    why = f"clusters of {size} make batches harder by {gain:.2f} nats"
    if best["false_negatives"] > _FALSE:
        why += f"; {best['false_negatives']:.1%} of their negatives look like answers, so mask them"
    return "harder", gain, why


def overall(groups: Mapping[str, Mapping[str, Any]], mixed: BatchFigures) -> dict[str, Any]:
    """Return the figures of the corpus: by the rows of the sources where batches of clusters are harder."""
    rows = {name: group["rows"] for name, group in groups.items()}
    outcome = {name: group["verdict"] for name, group in groups.items()}
    total = max(1, sum(rows.values()))
    share = sum(rows[name] for name in groups if outcome[name] == "harder") / total
    unknown = sum(rows[name] for name in groups if outcome[name] == "cannot tell") / total
    gain = sum(rows[name] * group["gain"] for name, group in groups.items()) / total
    source = sum(rows[name] * group["source"]["difficulty"] for name, group in groups.items()) / total
    if share >= 0.5:
        answer = f"Clusters make batches harder in sources that hold {share:.0%} of the rows"
        answer += "; `compare` measures whether results gain."
    elif share + unknown >= 0.5:
        answer = f"Cannot tell: sources with {unknown:.0%} of the rows need a larger sample or larger clusters"
        answer += " (predict.rows, predict.sizes)."
    else:
        answer = f"Clusters hardly make batches harder: only in sources that hold {share:.0%} of the rows."
    if source - mixed.difficulty < _HARDER and len(groups) > 1:
        answer += " Batches of one source are hardly harder than mixed ones, either."
    return {"answer": answer, "share": share, "gain": gain, "source_gain": source - mixed.difficulty}
