"""Cheap rank of a candidate: the difficulty of its batches, from a sample's vectors. No training, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.cells import mean_size
from clusterbatch.clustering.features import feature_vectors
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.config import RunConfig
from clusterbatch.experiments.predict.batch_figures import LEAST_BATCHES, Sample

_LEAST_SAMPLED = 32
_MOST_SCORED = 512


@dataclass(frozen=True)
class SourceSample:
    """Sample of one source; table: the sampled rows with vectors and hashes, shuffled; rows: of the whole source."""

    table: pa.Table
    sample: Sample
    rows: int


def rank_score(config: RunConfig, sources: Sequence[SourceSample]) -> float:
    """Return the loss in nats that true negatives would cause in a batch, less that of false ones.

    Clusters gain by true negatives that score high, and fail by false ones, which score as high as the answer itself
    and are not masked. Sources count by their rows. Clusters of fewer than two batches have the score of batches of the
    whole source: the hardness inside one is no credit to batches that are put together from several.
    """
    scores = [_source_score(config, source) for source in sources]
    return float(np.average(scores, weights=[source.rows for source in sources]))


def _source_score(config: RunConfig, source: SourceSample) -> float:
    sample, size = source.sample, mean_size(config) * config.batches.merged_clusters
    # What the sample is too small for is ranked as what it just suffices for.
    clusters = min(max(1, round(source.rows / size)), len(sample) // _LEAST_SAMPLED)
    label = np.zeros(len(sample), np.int64)
    fills = size >= LEAST_BATCHES * config.batches.size
    if config.batches.stratify == "cluster" and fills and clusters >= 2:
        vectors = feature_vectors(source.table, config.cluster.features)
        centers = fit(LocalRows.of(vectors, clusters=clusters), FitSettings(clusters, seed=config.cluster.seed)).centers
        label = Assigner(centers.centroids)(vectors).labels.numpy()
    true, false = np.array([[*_pairs(config, sample.take(np.flatnonzero(label == number)))] for number in set(label)]).T
    weight = np.array([np.count_nonzero(label == number) for number in set(label)])
    return float(np.average(true - false, weights=weight))


def _pairs(config: RunConfig, part: Sample) -> tuple[float, float]:
    """Return the expected loss by true and by false negatives in batches of these rows."""
    if len(part) < 2:
        return 0.0, 0.0
    part = part.take(np.arange(min(len(part), _MOST_SCORED)))
    scores = part.query.astype(np.float32) @ part.document.astype(np.float32).T
    own = np.diagonal(scores)[:, None]
    other = part.document_hash[:, None] != part.document_hash[None, :]
    other &= part.query_hash[:, None] != part.query_hash[None, :]
    mask = config.train.mask
    kept = other
    if mask.surrogate_margin is not None:
        margin = mask.surrogate_margin * np.abs(own) if mask.surrogate_relative else mask.surrogate_margin
        kept = other & (scores <= own + margin)
    weight = np.exp((scores - own) / config.train.temperature)
    count = np.maximum(other.sum(axis=1), 1)
    terms = [(weight * (kept & chosen)).sum(axis=1) / count for chosen in (scores < own, scores >= own)]
    true, false = (np.log1p((config.batches.size - 1) * term).mean() for term in terms)
    return float(true), float(false)
