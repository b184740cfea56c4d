"""Drift: nothing where nothing has changed, in a turned space too; all of it where rows change places."""

from __future__ import annotations

import numpy as np
import pytest

from clusterbatch.clustering.drift import group_drift, hardness, merge_drifts, nearest_company
from clusterbatch.config import RefreshConfig
from tests.clustering.embedded import blobs


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    return blobs(1500, 8, 24, seed=3)


def test_a_turned_space_is_no_drift(sample) -> None:
    vectors, label = sample
    turned = vectors @ np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0].astype(np.float32)
    found = group_drift(label, vectors, turned, turned, turned)
    assert found is not None
    figures = merge_drifts([found])
    assert figures["drift"] == 0
    assert figures["mutual_information"] > 0.999
    assert abs(figures["hardness"]) < 1e-6


def test_drift_is_the_share_of_rows_that_change_places(sample) -> None:
    vectors, label = sample
    moved = np.arange(len(vectors)) % 5 == 0
    new = vectors.copy()
    # A fifth of the rows become copies of rows of other clusters.
    donors = np.array([np.flatnonzero(label != label[row])[row // 2] for row in np.flatnonzero(moved)])
    new[moved] = vectors[donors]
    found = group_drift(label, vectors, new, new, new)
    assert found is not None
    figures = merge_drifts([found])
    assert figures["drift"] == pytest.approx(0.2, abs=0.03)
    assert figures["mutual_information"] < 0.8
    assert figures["movement"] > 0.001
    # New clusters would make batches harder again.
    assert figures["hardness"] > 0.05


def test_a_row_does_not_vote_for_itself() -> None:
    # Two rows of one label on opposite sides: each other's company is farther than the other label's.
    vectors = np.array([[1, 0], [-1, 0], [0.9, 0.1], [0.9, -0.1]], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert nearest_company(vectors, np.array([0, 0, 1, 1])).tolist() == [1, 0, 1, 1]


def test_hardness_is_the_mean_over_other_rows() -> None:
    random = np.random.default_rng(2)
    query, document = random.standard_normal((2, 30, 5)).astype(np.float32)
    label = random.integers(0, 4, 30)
    pairs = [query[i] @ document[label == label[i]].sum(axis=0) - query[i] @ document[i] for i in range(30)]
    counts = np.array([(label == label[i]).sum() - 1 for i in range(30)])
    assert hardness(query, document, label) == pytest.approx(np.mean(np.array(pairs) / counts), abs=1e-5)


def test_nothing_to_compare_is_no_drift() -> None:
    one = np.eye(3, dtype=np.float32)
    assert group_drift(np.array([0, 1, 2]), one, one, one, one) is None
    assert merge_drifts([])["drift"] == 0


def test_conditions_are_read_and_nonsense_is_refused() -> None:
    figures = {"drift": 0.2, "movement": 0.0, "hardness": -0.1}
    assert RefreshConfig(when="drift > 0.1").wants_clusters(figures)
    assert not RefreshConfig(when="hardness > 0").wants_clusters(figures)
    assert RefreshConfig().wants_clusters(figures)
    assert not RefreshConfig(when="never").wants_clusters(figures)
    with pytest.raises(ValueError, match="expected always"):
        RefreshConfig(when="drift >= much")
