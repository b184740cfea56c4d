"""Communities on small data: mutual neighbours against a search by hand, and sizes that fill batches exactly."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from clusterbatch.clustering.communities import communities, mutual_graph, with_size
from clusterbatch.search.neighbours import GroupKeys, neighbours
from tests.clustering.embedded import blobs

pytest.importorskip("pymetis")
FIRST, LAST = 2, 9


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query and document vectors of 150 rows, and the rows that the search finds at the ranks that count."""
    document, _ = blobs(150, 5, 12, seed=1, spread=0.6)
    query = document + 0.15 * np.random.default_rng(2).standard_normal(document.shape).astype(np.float32)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    own = np.arange(150).astype(np.uint64)
    found = neighbours(query, own, document, [document[:70], document[70:]], GroupKeys(own, own), LAST)
    return query, document, found.ranking.documents[:, FIRST:]


def test_joined_are_those_that_rank_each_other(rows) -> None:
    query, document, found = rows
    wanted: list[set[int]] = []
    for row in range(len(query)):
        others = sorted((other for other in range(len(query)) if other != row), key=lambda o: -query[row] @ document[o])
        wanted.append(set(others[FIRST:LAST]))
    graph = mutual_graph(found).toarray()
    alone = [row for row in range(len(query)) if not any(row in wanted[other] for other in wanted[row])]
    assert 0 < len(alone) < len(query) / 2
    for one, other in product(range(len(query)), repeat=2):
        mutual = other in wanted[one] and one in wanted[other]
        # Rows without any such neighbour are joined with all that they have themselves.
        lonely = (one in alone and other in wanted[one]) or (other in alone and one in wanted[other])
        assert graph[one, other] == (mutual or lonely), (one, other)


@pytest.mark.parametrize("size", [7, 16, 32, 149, 150, 151])
def test_all_but_one_have_exactly_the_size_asked_for(rows, size: int) -> None:
    label = communities(rows[2], size, seed=0)
    sizes = np.bincount(label)
    assert sorted(sizes)[1:] == [size] * (len(sizes) - 1)
    assert 0 < min(sizes) <= size
    assert np.array_equal(label, communities(rows[2], size, seed=0))


def test_the_joined_stand_together(rows) -> None:
    graph = mutual_graph(rows[2]).tocoo()
    label = communities(rows[2], 16, seed=0)
    inside = np.mean(label[graph.row] == label[graph.col])
    shuffled = np.random.default_rng(0).permutation(label)
    assert inside > 3 * np.mean(shuffled[graph.row] == shuffled[graph.col])


def test_those_that_know_nobody_fill_what_is_left() -> None:
    # Two cliques of five, and three rows that nobody knows, all put where no room is for them.
    found = np.full((13, 4), -1)
    for row in range(10):
        found[row] = [other for other in range(5 * (row // 5), 5 * (row // 5) + 5) if other != row]
    label = with_size(mutual_graph(found), np.array([0] * 5 + [1] * 8), 5)
    assert len(set(label[:5])) == len(set(label[5:10])) == len(set(label[10:])) == 1
    assert sorted(np.bincount(label)) == [3, 5, 5]


def test_without_any_neighbours_there_are_communities_all_the_same() -> None:
    assert sorted(np.bincount(communities(np.full((10, 3), -1), 4, seed=0))) == [2, 4, 4]
