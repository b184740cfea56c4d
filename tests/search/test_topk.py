from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.errors import DataError
from clusterbatch.search import topk as module
from clusterbatch.search.topk import Ranking, descending_ids, merge, search


def reference(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, sorted in full: score descending, then number ascending."""
    order = np.array([sorted(range(scores.shape[1]), key=lambda n: (-row[n], n))[:k] for row in scores])
    return np.take_along_axis(scores, order, 1), order


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 7),
    documents=st.integers(1, 40),
    k=st.integers(1, 12),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_equals_a_full_sort_also_where_many_scores_are_equal(queries, documents, k, levels, seed):
    rng = np.random.default_rng(seed)
    # One dimension and few levels: exact arithmetic, ties everywhere, also across the edge of the best k.
    q = torch.ones(queries, 1)
    d = torch.from_numpy(rng.integers(0, levels, (documents, 1)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_QUERY_BLOCK", 3)
        patch.setattr(module, "_DOCUMENT_BLOCK", 5)
        found = search(q, d, k)
    scores, order = reference((q @ d.T).numpy(), k)
    width = min(k, documents)
    np.testing.assert_array_equal(found.documents[:, :width], order)
    np.testing.assert_array_equal(found.scores[:, :width], scores)
    assert (found.documents[:, width:] == -1).all()
    assert np.isneginf(found.scores[:, width:]).all()


def test_disjoint_ranges_merge_to_the_whole():
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.normal(size=(50, 16)).astype(np.float32))
    d = torch.from_numpy(rng.normal(size=(300, 16)).astype(np.float32))
    whole = search(q, d, 20)
    pieces = []
    for start, end in [(0, 7), (7, 150), (150, 300)]:
        piece = search(q, d[start:end], 20)
        pieces.append(Ranking(piece.scores, np.where(piece.documents < 0, -1, piece.documents + start)))
    merged = merge(pieces, 20)
    np.testing.assert_array_equal(merged.documents, whole.documents)
    np.testing.assert_allclose(merged.scores, whole.scores, rtol=1e-5)


def test_a_document_with_the_querys_id_costs_no_place():
    q = torch.eye(2)
    d = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.9]])
    found = search(q, d, 2, excluded=np.array([0, -1]))
    assert found.documents.tolist() == [[1, 2], [2, 1]]


def test_an_excluded_document_is_not_an_answer_even_where_answers_are_few():
    found = search(torch.eye(1), torch.ones(2, 1), 2, excluded=np.array([1]))
    assert found.documents.tolist() == [[0, -1]]


def test_ids_descend_as_bytes():
    # Python compares strings by code point, trec_eval compares bytes: for UTF-8 it is the same order.
    ids = ["d10", "d9", "D9", "é", "日", "\U0001f600", "d1"]
    assert [ids[row] for row in descending_ids(ids)] == sorted(ids, key=lambda name: name.encode(), reverse=True)


def test_never_holds_the_whole_score_matrix(monkeypatch):
    shapes = []
    original = module._top

    def spy(scores, k):
        shapes.append(tuple(scores.shape))
        return original(scores, k)

    monkeypatch.setattr(module, "_top", spy)
    search(torch.ones(3000, 1), torch.ones(20_000, 1), 5)
    assert max(rows for rows, _ in shapes) <= 1024
    assert max(columns for _, columns in shapes) <= 8192


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused(value: float):
    broken = torch.eye(4)[:3].clone()
    broken[1, 2] = value
    with pytest.raises(DataError, match="1 of 3 query vectors are not finite"):
        search(broken, torch.eye(4), 2)
    with pytest.raises(DataError, match="1 of 3 document vectors are not finite"):
        search(torch.eye(4), broken, 2)
