"""Assignment against the naive product, for sizes that are no multiple of anything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.model import PartitionAssigner, PartitionModel
from clusterbatch.clustering.partial_sums import Centers


def unit(rows: int, dimensions: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 700), clusters=st.integers(1, 70), dimensions=st.integers(2, 40), seed=st.integers(0, 9))
def test_the_nearest_centroid_and_its_cosine(rows: int, clusters: int, dimensions: int, seed: int) -> None:
    vectors, centroids = unit(rows, dimensions, seed), unit(clusters, dimensions, seed + 100)
    found = Assigner(centroids)(vectors)
    similarity = vectors @ centroids.T
    assert found.labels.max() < clusters
    np.testing.assert_allclose(found.cosine.numpy(), similarity.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(similarity[np.arange(rows), found.labels.numpy()], similarity.max(axis=1), atol=1e-5)


@pytest.mark.parametrize(("clusters", "sign"), [(600, 1), (600, -1), (7, -1)])
def test_bfloat16_finds_a_maximum_among_all_columns(clusters: int, sign: int) -> None:
    """Also where every similarity is negative, which is ordered the other way round in its bits."""
    vectors, centroids = np.abs(unit(300, 24, 0)), sign * np.abs(unit(clusters, 24, 1))
    found = Assigner(centroids, dtype=torch.bfloat16)(vectors)
    similarity = vectors @ centroids.T
    chosen = similarity[np.arange(300), found.labels.numpy()]
    np.testing.assert_allclose(chosen, similarity.max(axis=1), atol=0.012)
    np.testing.assert_allclose(found.cosine.numpy(), chosen, atol=0.01)


def test_bfloat16_confuses_only_what_is_nearly_equal() -> None:
    vectors, centroids = unit(3000, 64, 0), unit(100, 64, 1)
    similarity = vectors @ centroids.T
    labels = Assigner(centroids, dtype=torch.bfloat16)(vectors).labels.numpy()
    lost = similarity.max(axis=1) - similarity[np.arange(len(vectors)), labels]
    assert lost.max() < 0.01
    assert (lost > 0).mean() < 0.1


def test_a_bias_moves_the_choice_and_not_the_cosine() -> None:
    vectors, centroids = unit(500, 16, 0), unit(5, 16, 1)
    bias = np.array([0, 0, -5, 0.1, 0], np.float32)
    found = Assigner(centroids, bias)(vectors)
    similarity = vectors @ centroids.T
    expected = (similarity + bias).argmax(axis=1)
    assert np.array_equal(found.labels.numpy(), expected)
    np.testing.assert_allclose(found.cosine.numpy(), similarity[np.arange(500), expected], atol=1e-5)


def two_levels(coarse: int, sizes: tuple[int, ...]) -> PartitionModel:
    fine = [Centers(unit(size, 24, 10 + size)) for size in sizes]
    return PartitionModel(fine, np.ones(sum(sizes)) / sum(sizes), coarse=Centers(unit(coarse, 24, 1)))


def test_two_levels_look_inside_the_nearest_coarse_clusters() -> None:
    vectors, model = unit(2000, 24, 0), two_levels(6, (1, 2, 9, 4, 5, 8))
    assert model.coarse is not None
    labels, cosine = PartitionAssigner(model)(vectors)
    centroids = np.concatenate([centers.centroids for centers in model.fine])
    cell = np.repeat(np.arange(6), [len(centers.centroids) for centers in model.fine])
    similarity, coarse = vectors @ centroids.T, vectors @ model.coarse.centroids.T
    # The fourth highest similarity to a coarse centroid is the lowest that is looked into.
    looked_into = (coarse >= np.sort(coarse, axis=1)[:, -4:-3])[:, cell]
    expected = np.where(looked_into, similarity, -2).max(axis=1)
    np.testing.assert_allclose(cosine, expected, atol=1e-5)
    np.testing.assert_allclose(similarity[np.arange(2000), labels], cosine, atol=1e-5)
    assert np.mean(cosine > np.where(coarse.argmax(axis=1)[:, None] == cell, similarity, -2).max(axis=1) + 1e-4) > 0.2


def test_few_coarse_clusters_are_all_looked_into() -> None:
    vectors, model = unit(300, 24, 0), two_levels(3, (2, 3, 4))
    labels, cosine = PartitionAssigner(model)(vectors)
    similarity = vectors @ np.concatenate([centers.centroids for centers in model.fine]).T
    assert np.array_equal(labels, similarity.argmax(axis=1))
    np.testing.assert_allclose(cosine, similarity.max(axis=1), atol=1e-5)


def test_biased_clusters_share_out_the_rows_of_one_coarse_cluster() -> None:
    vectors, model = unit(300, 24, 0), two_levels(3, (2, 3, 4))
    biased = replace(
        model, fine=[Centers(fine.centroids, np.zeros(len(fine.centroids), np.float32)) for fine in model.fine]
    )
    labels, _ = PartitionAssigner(biased)(vectors)
    cell = np.repeat(np.arange(3), [2, 3, 4])
    assert model.coarse is not None
    assert np.array_equal(cell[labels], (vectors @ model.coarse.centroids.T).argmax(axis=1))
