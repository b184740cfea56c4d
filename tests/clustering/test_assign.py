"""Assignment against the naive product, for sizes that are no multiple of anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.models import GroupAssigner, GroupModel
from clusterbatch.clustering.sums import Centers


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


def test_two_levels_look_only_inside_the_coarse_cluster() -> None:
    vectors, coarse = unit(2000, 24, 0), unit(6, 24, 1)
    fine = [unit(size, 24, 10 + size) for size in (1, 2, 9, 4, 5, 8)]
    model = GroupModel([Centers(centroids) for centroids in fine], np.ones(29) / 29, coarse=Centers(coarse))
    labels, cosine = GroupAssigner(model)(vectors)
    first = np.concatenate([[0], np.cumsum([len(centroids) for centroids in fine])])
    for row in range(0, 2000, 7):
        inside = int((coarse @ vectors[row]).argmax())
        similarity = fine[inside] @ vectors[row]
        assert labels[row] == first[inside] + similarity.argmax()
        assert cosine[row] == pytest.approx(similarity.max(), abs=1e-5)
