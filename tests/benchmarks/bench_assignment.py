"""The assignment pass against the machine's GEMM rate: `python -m tests.benchmarks.bench_assignment VECTORS`.

The product alone, in the same blocks, type and layout, is what the machine can do; assignment adds casts, the maximum
and its place. Prints one JSON line per type, with the rate of one large product for comparison.
"""

from __future__ import annotations

import numpy as np
import torch

from clusterbatch.clustering.assign import Assigner
from tests.benchmarks.figures import emit
from tests.benchmarks.vectors import in_turn, load_vectors, vector_arguments


def measure(vectors: np.ndarray, clusters: int, dtype: torch.dtype, rounds: int) -> None:
    assigner = Assigner(vectors[:clusters], dtype=dtype)
    columns = assigner._centroids_DK
    typed = torch.from_numpy(vectors).to(dtype)
    block_rows = assigner.block_rows
    buffer = torch.empty(block_rows, columns.shape[1], dtype=dtype)
    whole = torch.empty(len(typed), columns.shape[1], dtype=dtype)

    def product() -> None:
        for start in range(0, len(typed), block_rows):
            block = typed[start : start + block_rows]
            torch.mm(block, columns, out=buffer[: len(block)])

    found = in_turn(
        {
            "product in blocks": product,
            "one product": lambda: torch.mm(typed, columns, out=whole),
            "assignment": lambda: assigner(vectors),
        },
        rounds,
    )
    operations = 2.0 * len(vectors) * clusters * vectors.shape[1]
    rates = {name: operations / entry["cpu"] / 1e9 for name, entry in found.items()}
    emit(
        "assignment, GFLOP/s against the product alone",
        rates["assignment"],
        "GFLOP per CPU second",
        case=str(dtype).removeprefix("torch."),
        peer=rates["product in blocks"],
        one_large_product=round(rates["one product"], 1),
        rows=len(vectors),
        dimensions=vectors.shape[1],
        clusters=clusters,
        rounds_cpu={name: entry["rounds_cpu"] for name, entry in found.items()},
    )


def main() -> None:
    options = vector_arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    vectors = load_vectors(options.vectors, options.rows or 65_536)
    for dtype in (torch.float32, torch.bfloat16):
        measure(vectors, options.clusters, dtype, options.rounds)


if __name__ == "__main__":
    main()
