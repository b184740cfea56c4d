"""Communities of mutual neighbours: rows whose queries find each other's documents, in groups of one small size.

Thirukovalluru 2025, "Breaking the Batch Barrier (B3) of Contrastive Learning via Smart Batch Mining" (arXiv
2505.11293): of the documents in order of a teacher's score the first are likely answers and are skipped; the next ones
are a query's neighbours; two rows that are each other's neighbours are hard negatives of one another. METIS (Karypis
and Kumar 1998) cuts the graph of such pairs into parts that keep most of it inside; a batch is made of several.

Memory is that of one source's graph: about 15 bytes for each row and each rank that is kept.

Legend: N rows of one group, R ranks that are kept, C communities.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from scipy import sparse

from clusterbatch.errors import UsageError


def require_partitioner() -> None:
    """Raise UsageError if METIS is not installed."""
    if importlib.util.find_spec("pymetis") is None:
        raise UsageError(
            "cluster.method: communities needs the package pymetis (pip install 'clusterbatch[communities]')"
        )


def communities(neighbours: np.ndarray, size: int, seed: int) -> np.ndarray:
    """(N,) int64 in [0, C): communities of exactly `size` rows, except one that has the remaining rows.

    neighbours: (N, R) rows whose documents the row's query finds at the ranks that count, -1 where there are none.
    """
    graph = mutual_graph(neighbours)
    count = -(-len(neighbours) // size)
    return with_size(graph, _partition(graph, count, seed), size)


def mutual_graph(neighbours: np.ndarray) -> sparse.csr_matrix:
    """(N, N) symmetric, 1 where two rows are joined: those that are each other's neighbours.

    A row that is nobody's mutual neighbour is joined with all of its neighbours, so that it gets a place as well.
    """
    rows = len(neighbours)
    present = neighbours >= 0
    starts = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    found = neighbours[present]
    directed = sparse.csr_matrix((np.ones(len(found), np.int8), found, starts), shape=(rows, rows))
    mutual = directed.multiply(directed.T.tocsr()).tocsr()
    alone = sparse.diags_array(np.diff(mutual.indptr) == 0, dtype=np.int8) @ directed
    graph = sparse.csr_matrix(mutual + alone + alone.T)
    graph.data[:] = 1
    graph.sort_indices()
    return graph


def _partition(graph: sparse.csr_matrix, count: int, seed: int) -> np.ndarray:
    """(N,) int64 in [0, count): parts of about equal size with few joined rows apart. Deterministic for a seed."""
    if count == 1 or not graph.nnz:
        return np.arange(graph.shape[0]) * count // graph.shape[0]
    import pymetis

    # Halves of halves: for thousands of parts faster than METIS' direct way, and a better cut.
    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices)
    _, label = pymetis.part_graph(count, adjacency, recursive=True, options=pymetis.Options(seed=seed))
    return np.asarray(label, np.int64)


def with_size(graph: sparse.csr_matrix, label: np.ndarray, size: int) -> np.ndarray:
    """(N,) int64: the parts `label` with rows moved until each has `size` rows, except the least joined one.

    Batches are made of whole parts: one with a row more or less would be taken apart. The rows that move are those
    joined with the fewest of their part; each goes to the part with room that it is joined with most.
    """
    rows = len(label)
    count = -(-rows // size)
    member = sparse.csr_matrix((np.ones(rows, np.int32), (np.arange(rows), label)), shape=(rows, count))
    known = sparse.csr_matrix(graph.astype(np.int32) @ member)
    own = np.asarray(known[np.arange(rows), label]).ravel()
    room = np.full(count, size)
    room[np.argmin(np.bincount(label, own, count))] = rows - (count - 1) * size
    order = np.lexsort((-own, label))
    sizes = np.bincount(label, minlength=count)
    place = np.arange(rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moving = np.sort(order[place >= room[label[order]]])
    room -= np.minimum(sizes, room)
    label = label.copy()
    label[moving] = -1
    ties = known[moving].tocoo()
    best = np.lexsort((ties.col, ties.row, -ties.data))
    for row, part in zip(moving[ties.row[best]].tolist(), ties.col[best].tolist(), strict=True):
        if label[row] < 0 and room[part] > 0:
            label[row] = part
            room[part] -= 1
    left = moving[label[moving] < 0]
    label[left] = np.repeat(np.arange(count), room)
    return label
