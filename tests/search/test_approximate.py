"""The approximate search against the exact one: the same where every list is probed, nearly so where few are."""

from __future__ import annotations

import numpy as np
import pytest

from clusterbatch.search.neighbours import ApproximateIndex, GroupKeys, neighbours

K = 10


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, and such that nothing is lost where they are kept as float16."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, ...]:
    """Queries and documents about 40 subjects, 2,000 of them; some queries have many answers, some documents repeat."""
    random = np.random.default_rng(3)
    subjects = random.standard_normal((40, 16))
    subject = random.integers(0, 40, 2000)
    query, document = (unit(subjects[subject] + 0.7 * random.standard_normal((2000, 16))) for _ in range(2))
    query_hash = random.integers(0, 900, 2000).astype(np.uint64)
    document_hash = random.integers(0, 1500, 2000).astype(np.uint64)
    _, query_row = np.unique(query_hash, return_index=True)
    _, document_row = np.unique(document_hash, return_index=True)
    query = query[query_row[np.searchsorted(np.unique(query_hash), query_hash)]]
    document = document[document_row[np.searchsorted(np.unique(document_hash), document_hash)]]
    return query, document, query_hash, document_hash


def test_with_every_list_it_is_the_exact_search(rows: tuple[np.ndarray, ...]) -> None:
    query, document, query_hash, document_hash = rows
    keys = GroupKeys(query_hash, document_hash)
    exact = neighbours(query, query_hash, document, [document], keys, K)
    index = ApproximateIndex(lambda: pieces(document, 300), keys, 10**6)
    found = index.search(query, query_hash, document, K, 50)
    assert np.array_equal(found.ranking.documents, exact.ranking.documents)
    assert np.allclose(found.ranking.scores, exact.ranking.scores, atol=1e-5)
    assert np.allclose(found.positive, exact.positive)
    # Ranks are known as far as they were asked for.
    assert np.array_equal(np.minimum(found.rank, 50), np.minimum(exact.rank, 50))
    assert (exact.rank > 50).any()


def test_with_few_lists_it_finds_nearly_all_whatever_the_pieces(rows: tuple[np.ndarray, ...]) -> None:
    query, document, query_hash, document_hash = rows
    keys = GroupKeys(query_hash, document_hash)
    exact = neighbours(query, query_hash, document, [document], keys, K).ranking.documents
    # 89 lists.
    found = [
        ApproximateIndex(lambda size=size: pieces(document, size), keys, 8)
        .search(query[:500], query_hash[:500], document[:500], K)
        .ranking.documents
        for size in (2000, 130)
    ]
    assert np.array_equal(found[0], found[1])
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found[0], exact[:500], strict=True)])
    assert 0.85 < recall < 1


def test_a_query_that_everything_answers_finds_nothing(rows: tuple[np.ndarray, ...]) -> None:
    _, document, _, document_hash = rows
    few = slice(0, 100)
    keys = GroupKeys(np.zeros(100, np.uint64), document_hash[few])
    index = ApproximateIndex(lambda: [document[few]], keys, 8)
    found = index.search(document[:3], np.zeros(3, np.uint64), document[:3], 4)
    assert np.all(found.ranking.documents == -1)
    assert np.all(np.isneginf(found.ranking.scores))
