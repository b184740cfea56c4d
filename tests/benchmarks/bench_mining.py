"""The approximate search of a large source against the exact one: `python -m tests.benchmarks.bench_mining VECTORS`.

Real vectors as one source, some of them as its queries, one thread. One JSON line per number of probes: the share of
the exact search's 50 best that is found, and seconds a query, the index apart; then the seconds that the index takes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from clusterbatch.search.neighbours import ApproximateIndex, GroupKeys, neighbours
from tests.benchmarks.figures import emit
from tests.benchmarks.vectors import load_vectors, vector_arguments

QUERIES, DEPTH, PIECE = 4096, 50, 16_384
PROBES = (8, 32, 128)


def main() -> None:
    options = vector_arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    # As they are kept.
    vectors = load_vectors(options.vectors, options.rows).astype(np.float16)
    queries, documents = vectors[:QUERIES], vectors[QUERIES:]
    # No document comes twice, and none answers a query.
    keys = GroupKeys(np.arange(len(documents), dtype=np.uint64), np.arange(len(documents), dtype=np.uint64))
    nobody = len(documents) + np.arange(len(queries), dtype=np.uint64)
    pieces = [documents[start : start + PIECE] for start in range(0, len(documents), PIECE)]
    exact, exact_seconds = timed(lambda: neighbours(queries, nobody, queries, pieces, keys, DEPTH))
    index, building = timed(lambda: ApproximateIndex(lambda: pieces, keys, PROBES[0]))
    for probes in PROBES:
        index.probes = probes
        found, seconds = timed(lambda: index.search(queries, nobody, queries, DEPTH))
        both = zip(found.ranking.documents, exact.ranking.documents, strict=True)
        recall = np.mean([len(set(mine) & set(best)) / DEPTH for mine, best in both])
        emit("mining, share of the exact search's 50 best", float(recall), case=f"{probes} probes", rows=len(documents))
        emit(
            "mining, milliseconds a query against the exact search",
            1e3 * seconds / len(queries),
            "ms",
            peer=1e3 * exact_seconds / len(queries),
            case=f"{probes} probes",
        )
    emit("mining, seconds to index a source", building, "s", rows=len(documents), dimensions=documents.shape[1])


def timed(work: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


if __name__ == "__main__":
    main()
