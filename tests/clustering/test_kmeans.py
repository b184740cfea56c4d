"""The fit: sums against naive loops, quality against faiss and scikit-learn, and what must not change it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit, seed_centroids
from clusterbatch.clustering.partial_sums import Centers, LocalRows, PartialSums, chunk_count, chunk_sums, merge
from clusterbatch.shards.statistics import gini
from tests.clustering.embedded import blobs
from tests.clustering.test_assign import unit


def mean_cosine(centroids: np.ndarray, vectors: np.ndarray) -> float:
    return float(Assigner(centroids)(vectors).cosine.double().mean())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), clusters=st.integers(1, 20), weighted=st.booleans(), seed=st.integers(0, 9))
def test_sums_of_a_chunk_are_those_of_a_loop(rows: int, clusters: int, weighted: bool, seed: int) -> None:
    vectors, centroids = unit(rows, 8, seed), unit(clusters, 8, seed + 50)
    weights = np.random.default_rng(seed).uniform(0.5, 3, rows).astype(np.float32) if weighted else None
    found = chunk_sums(Assigner(centroids), vectors, weights)
    counts, sums, cosine = np.zeros(clusters), np.zeros((clusters, 8)), 0.0
    for row in range(rows):
        nearest = int((centroids @ vectors[row]).argmax())
        weight = 1.0 if weights is None else float(weights[row])
        counts[nearest] += weight
        sums[nearest] += weight * vectors[row]
        cosine += weight * float(centroids[nearest] @ vectors[row])
    np.testing.assert_allclose(found.counts, counts, rtol=1e-6)
    np.testing.assert_allclose(found.sums, sums, atol=1e-4)
    assert found.cosine == pytest.approx(cosine, abs=1e-3)
    assert found.histogram.sum() == rows
    labels = (vectors @ centroids.T).argmax(axis=1)
    assert found.rows.tolist() == np.bincount(labels, minlength=clusters).tolist()


class _Elsewhere:
    """Rows whose chunks are computed one by one, in another order, as workers would."""

    def __init__(self, vectors: np.ndarray, clusters: int, backwards: bool) -> None:
        local = LocalRows.of(vectors, clusters=clusters)
        self._local, self._backwards = local, backwards
        self.chunk_rows = local.chunk_rows
        self.head = local.head

    def partial_sums(self, centers: Centers, chunks: Sequence[int], dtype: torch.dtype) -> PartialSums:
        order = reversed(list(chunks)) if self._backwards else list(chunks)
        answers = {chunk: self._local.partial_sums(centers, [chunk], dtype) for chunk in order}
        return merge(answers[chunk] for chunk in chunks)


def test_the_result_does_not_depend_on_who_computes_which_chunk() -> None:
    vectors, _ = blobs(20_000, 40, 32, seed=3, spread=1.0)
    wanted = FitSettings(60, seed=5)
    one = fit(LocalRows.of(vectors, clusters=60), wanted)
    for backwards in (False, True):
        other = fit(_Elsewhere(vectors, 60, backwards), wanted)
        assert np.array_equal(one.centers.centroids, other.centers.centroids)
    assert np.array_equal(one.centers.centroids, fit(LocalRows.of(vectors, clusters=60), wanted).centers.centroids)


def test_centroids_have_unit_length_and_the_objective_rises() -> None:
    vectors, _ = blobs(8000, 20, 24, seed=1, spread=0.8)
    found = fit(LocalRows.of(vectors, clusters=25), FitSettings(25, passes=9))
    np.testing.assert_allclose(np.linalg.norm(found.centers.centroids, axis=1), 1, atol=1e-5)
    whole = found.history[-3:]
    assert whole == sorted(whole)
    assert mean_cosine(found.centers.centroids, vectors) >= whole[-1] - 1e-6


def test_well_separated_clusters_are_found() -> None:
    vectors, label = blobs(6000, 12, 32, seed=2, spread=0.3)
    found = Assigner(fit(LocalRows.of(vectors, clusters=12), FitSettings(12, passes=9, restarts=4)).centers.centroids)
    pairs = set(zip(label.tolist(), found(vectors).labels.tolist(), strict=True))
    assert len(pairs) == 12


def test_dead_centroids_are_seeded_again() -> None:
    # All but a few rows are copies of two points: most seeds would have nothing.
    vectors = np.concatenate([np.repeat(unit(2, 16, 0), 2000, axis=0), unit(400, 16, 1)])
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    found = fit(LocalRows.of(vectors, clusters=24), FitSettings(24, passes=9))
    counts = np.bincount(Assigner(found.centers.centroids)(vectors).labels.numpy(), minlength=24)
    assert np.count_nonzero(counts) >= 20


def test_weights_count_as_copies() -> None:
    vectors, _ = blobs(4000, 3, 8, seed=4, spread=1.5)
    weights = np.where(vectors[:, 0] > 0, 20.0, 0.05)
    plain = fit(LocalRows.of(vectors, clusters=3), FitSettings(3, passes=9, restarts=3))
    weighted = fit(LocalRows.of(vectors, weights, clusters=3), FitSettings(3, passes=9, restarts=3))
    heavy = vectors[weights > 1]
    assert mean_cosine(weighted.centers.centroids, heavy) > mean_cosine(plain.centers.centroids, heavy)


def test_rows_without_any_weight_count_by_their_number() -> None:
    vectors, _ = blobs(4000, 8, 16, seed=4, spread=0.5)
    plain, weightless = (
        fit(LocalRows.of(vectors, weights, clusters=8), FitSettings(8)) for weights in (None, np.zeros(4000))
    )
    assert np.array_equal(plain.centers.centroids, weightless.centers.centroids)
    assert weightless.sums.rows.sum() == 4000


def test_restarts_keep_the_best() -> None:
    vectors, _ = blobs(3000, 15, 16, seed=9, spread=0.3)
    rows = LocalRows.of(vectors, clusters=15)
    alone = [fit(rows, FitSettings(15, seed=seed)).mean_cosine for seed in range(4)]
    assert fit(rows, FitSettings(15, seed=0, restarts=4)).mean_cosine == max(alone)


def test_balanced_clusters_are_more_equal_at_some_cost() -> None:
    random = np.random.default_rng(0)
    vectors, _ = blobs(12_000, 30, 16, seed=6, spread=1.0)
    vectors = vectors[random.permutation(len(vectors))]
    rows = LocalRows.of(vectors, clusters=20)
    plain, equal = fit(rows, FitSettings(20)), fit(rows, FitSettings(20, balanced=True))
    assert gini(equal.sums.counts) < 0.5 * gini(plain.sums.counts)
    assert plain.mean_cosine - 0.1 < equal.mean_cosine < plain.mean_cosine + 0.01


def test_seeds_are_different_rows_spread_by_distance() -> None:
    vectors, label = blobs(4000, 16, 32, seed=8, spread=0.2)
    seeds = seed_centroids(vectors, None, 64, np.random.default_rng(0))
    assert len(np.unique(seeds, axis=0)) == 64
    means = np.array([vectors[label == centre].mean(axis=0) for centre in range(16)])
    assert len(set((seeds @ means.T).argmax(axis=1).tolist())) == 16


def test_fewer_rows_than_clusters_gives_one_cluster_per_row() -> None:
    found = fit(LocalRows.of(unit(5, 8, 0)), FitSettings(9))
    assert found.centers.centroids.shape == (5, 8)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 10**9), clusters=st.integers(1, 10**6))
def test_chunks_have_rows_for_every_centroid(rows: int, clusters: int) -> None:
    chunks = chunk_count(rows, clusters)
    assert chunks % 8 == 0
    assert chunks == 8 or rows / chunks >= 2 * clusters


@pytest.fixture(scope="module")
def real_vectors(data_folder: Path) -> np.ndarray:
    """Static embeddings of real documents: cheap, and as uneven as real vectors are."""
    import pyarrow.parquet as pq

    from clusterbatch.encoder.load import load_encoder
    from clusterbatch.encoder.resolve import resolve_model

    encoder = load_encoder(resolve_model("all-MiniLM-L6-v2"), kind="static")
    texts = pq.read_table(data_folder / "pairs" / "tldr.parquet", columns=["document"])["document"].to_pylist()
    vectors = encoder.encode(encoder.tokenizer.encode(texts, 64), 65_536)
    return vectors[np.random.default_rng(0).permutation(len(vectors))].astype(np.float32)


@pytest.mark.data
def test_as_good_as_faiss_and_scikit_learn_on_real_vectors(real_vectors: np.ndarray) -> None:
    clusters = 64
    ours = fit(LocalRows.of(real_vectors, clusters=clusters), FitSettings(clusters, passes=9)).centers.centroids
    peer = faiss.Kmeans(real_vectors.shape[1], clusters, niter=25, spherical=True, seed=1)
    peer.train(real_vectors)
    euclidean = KMeans(clusters, n_init=1, max_iter=25, random_state=0).fit(real_vectors).cluster_centers_
    of_ours = mean_cosine(ours, real_vectors)
    for theirs in (peer.centroids, euclidean):
        theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
        assert of_ours > 0.99 * mean_cosine(theirs.astype(np.float32), real_vectors)
