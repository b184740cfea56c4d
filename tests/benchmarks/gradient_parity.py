"""How far the gradient of a global batch over W ranks is from float64 autograd of one process.

`python -m tests.benchmarks.gradient_parity` prints one JSON line per case: a small encoder in float64, and whole steps
of transformers without padding in float32, with the largest error of any parameter.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.figures import emit
from tests.encoder.models import make_model
from tests.training.parity import parity_table, transformer_parity

_ARCHITECTURES = ("bert", "distilbert", "modernbert")


def main() -> None:
    for case in parity_table():
        name = f"{case.ranks} ranks, {case.backward}, {case.data}, {case.directions}"
        figure = "gradient, largest error against float64 autograd"
        emit(figure, case.gradient_error, "of the norm", case=name, loss_error=case.loss_error)
    for architecture in _ARCHITECTURES:
        with TemporaryDirectory() as folder:
            errors = transformer_parity(str(make_model(architecture, Path(folder))))
        for (ranks, kept), error in errors.items():
            name = f"{architecture} without padding, {ranks} ranks, kept: {kept}"
            emit("gradient in float32, largest error of a parameter against float64", error, "of its norm", case=name)


if __name__ == "__main__":
    main()
