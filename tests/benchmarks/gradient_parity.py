"""Prints how far the gradient of a global batch over W ranks is from float64 autograd of one process.

python -m tests.benchmarks.gradient_parity
"""

from __future__ import annotations

from tests.training.parity import parity_table


def main() -> None:
    row = "{:>5}  {:<8} {:<15} {:<10} {:>14} {:>14}"
    print(row.format("ranks", "backward", "data", "directions", "loss error", "gradient error"))
    for case in parity_table():
        errors = f"{case.loss_error:.1e}", f"{case.gradient_error:.1e}"
        print(row.format(case.ranks, case.backward, case.data, case.directions, *errors))


if __name__ == "__main__":
    main()
