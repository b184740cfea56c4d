"""Measures against pytrec_eval (BEIR's) and ranx on identical runs: `python -m tests.benchmarks.bench_metrics`.

One JSON line per collection and measure with the largest difference of any query; the promise is 1e-6. Reads the
collections of the data folder (CLUSTERBATCH_DATA).
"""

from __future__ import annotations

import numpy as np

from tests.benchmarks.figures import emit
from tests.data_folder import require_data_folder
from tests.evaluation.parity import COLLECTIONS, MEASURES, made_up_run, measured, open_collection


def main() -> None:
    folder = require_data_folder()
    for name in COLLECTIONS:
        collection = open_collection(folder, name)
        judgements = collection.read_judgements()
        values = measured(judgements, made_up_run(collection, judgements))
        for measure, _, _ in MEASURES:
            ours = values["clusterbatch"][measure]
            for program in ("pytrec_eval", "ranx"):
                if measure in values[program]:
                    largest = float(np.abs(ours - values[program][measure]).max())
                    case, mean = f"{name}, {measure}", float(ours.mean())
                    emit(f"metrics, largest difference to {program}", largest, case=case, mean=mean)


if __name__ == "__main__":
    main()
