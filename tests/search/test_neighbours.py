"""The streamed search against all scores at once."""

from __future__ import annotations

import numpy as np
import pytest

from clusterbatch.search.neighbours import GroupKeys, neighbours


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(5)
    query, document = random.standard_normal((2, 300, 12)).astype(np.float32)
    query, document = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, document))
    # Queries with several answers, and documents that come under several queries.
    query_hash = random.integers(0, 120, 300).astype(np.uint64)
    document_hash = random.integers(0, 200, 300).astype(np.uint64)
    query, document = query[query_hash.astype(int)], document[document_hash.astype(int)]
    return query, document, query_hash, document_hash


@pytest.mark.parametrize("chunk", [300, 64, 7])
def test_neighbours_are_the_best_documents_that_do_not_answer(rows, chunk: int) -> None:
    query, document, query_hash, document_hash = rows
    keys = GroupKeys(query_hash, document_hash)
    chunks = [document[start : start + chunk] for start in range(0, 300, chunk)]
    found = neighbours(query[40:90], query_hash[40:90], document[40:90], iter(chunks), keys, 10)
    scores = query @ document.T
    for number, row in enumerate(range(40, 90)):
        answers = set(document_hash[query_hash == query_hash[row]].tolist())
        by_document = {
            int(identity): float(scores[row, np.flatnonzero(document_hash == identity)[0]])
            for identity in np.unique(document_hash)
        }
        best = sorted((-score, identity) for identity, score in by_document.items() if identity not in answers)[:10]
        mine = document_hash[found.ranking.documents[number]].tolist()
        assert len(set(mine)) == 10
        assert set(mine) == {identity for _, identity in best}
        assert np.allclose(found.ranking.scores[number], [-score for score, _ in best], atol=1e-5)
        own = by_document[int(document_hash[row])]
        assert found.positive[number] == pytest.approx(own, abs=1e-5)
        assert found.rank[number] == sum(score > own + 1e-5 for score in by_document.values())


def test_where_everything_answers_nothing_is_left(rows) -> None:
    query, document, _, document_hash = rows
    keys = GroupKeys(np.zeros(300, np.uint64), document_hash)
    found = neighbours(query[:5], np.zeros(5, np.uint64), document[:5], [document], keys, 4)
    assert np.all(found.ranking.documents == -1)
    assert np.all(np.isneginf(found.ranking.scores))
