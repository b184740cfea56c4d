"""Successive halving's arithmetic, and the cheap rank of candidates."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from clusterbatch.config import RunConfig, TuneConfig, with_changes
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.experiments.predict.stage import read_sample
from clusterbatch.experiments.tune.rank import SourceSample, rank_score
from clusterbatch.experiments.tune.stage import best, rung_sizes, rung_steps
from tests.clustering.embedded import blobs


def test_rungs_train_fewer_candidates_for_longer() -> None:
    assert rung_sizes(9, 3, 3) == [9, 3, 1]
    assert rung_sizes(5, 2, 3) == [5, 2]
    assert rung_sizes(2, 5, 3) == [2, 1]
    assert rung_steps(900, 3, 3) == [100, 300, 900]
    assert best([0.1, 0.5, 0.5, 0.2], 3) == [1, 2, 3]


def _source(spread: float) -> SourceSample:
    """A source of sixteen topics; spread: how far queries lie from their documents."""
    documents, _ = blobs(1600, 16, 24, seed=0, spread=0.5)
    queries = (
        documents + spread * np.random.default_rng(1).standard_normal(documents.shape).astype(np.float32) / 24**0.5
    )
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    hashes = np.arange(1600, dtype=np.uint64)
    table = pa.table(
        {
            "query_vector": vector_column(queries.astype(np.float16)),
            "document_vector": vector_column(documents.astype(np.float16)),
            "query_hash": hashes,
            "document_hash": hashes,
        }
    )
    return SourceSample(table, read_sample(table), 16_000)


def _score(source: SourceSample, **changes: object) -> float:
    return rank_score(with_changes(RunConfig(workspace="here"), changes), [source])


def test_smaller_clusters_rank_higher_until_the_negatives_are_false() -> None:
    clean = _source(0.3)
    random = _score(clean, **{"batches.stratify": "random"})
    assert random < _score(clean, **{"cluster.mean_size": 4000}) < _score(clean, **{"cluster.mean_size": 1000})


def test_clusters_that_do_not_fill_batches_rank_like_batches_of_the_source() -> None:
    clean = _source(0.3)
    small = {"batches.size": 1024, "cluster.mean_size": 256}
    source = _score(clean, **{"batches.size": 1024, "batches.stratify": "source"})
    assert _score(clean, **small) == source
    assert _score(clean, **{**small, "cluster.mean_size": 2048}) > source
    # Eight neighbours that count as one are such a cluster.
    assert _score(clean, **{**small, "batches.merged_clusters": 8}) > source


def test_a_mask_helps_where_negatives_are_false() -> None:
    # Queries lie so far off that other documents of the topic score as high as their own.
    noisy = _source(1.5)
    masked = {"train.mask.surrogate_margin": 0.0, "cluster.mean_size": 1000}
    assert _score(noisy, **masked) > _score(noisy, **{"cluster.mean_size": 1000})


@pytest.mark.parametrize(
    "candidates", [{"embed.model": ["a", "b"]}, {"cluster.seed": [1]}, {"cluster.seed": []}, {"train.epochs": [1, 2]}]
)
def test_candidates_without_sense_are_refused(candidates: dict[str, list]) -> None:
    with pytest.raises(ValidationError):
        TuneConfig(candidates=candidates)
