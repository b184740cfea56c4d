"""How far the gradient of a global batch over W ranks is from float64 autograd of one process.

`python -m tests.benchmarks.gradient_parity` prints one JSON line per case.
"""

from __future__ import annotations

from tests.benchmarks.figures import emit
from tests.training.parity import parity_table


def main() -> None:
    for case in parity_table():
        name = f"{case.ranks} ranks, {case.backward}, {case.data}, {case.directions}"
        figure = "gradient, largest error against float64 autograd"
        emit(figure, case.gradient_error, "of the norm", case=name, loss_error=case.loss_error)


if __name__ == "__main__":
    main()
