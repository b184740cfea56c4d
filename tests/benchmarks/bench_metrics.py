"""Measures against pytrec_eval (BEIR's) and ranx on identical runs: `python -m tests.benchmarks.bench_metrics`.

One JSON line per collection and measure with the largest difference of any query; the promise is 1e-6. Reads the
collections of the data folder (CLUSTERBATCH_DATA).
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np

from tests.evaluation.parity import COLLECTIONS, MEASURES, made_up_run, measured, open_collection

PROMISE = 1e-6


def main() -> None:
    folder = Path(os.environ.get("CLUSTERBATCH_DATA", Path(__file__).parents[3] / "shared" / "data"))
    for name in COLLECTIONS:
        collection = open_collection(folder, name)
        judgements = collection.read_judgements()
        values = measured(judgements, made_up_run(collection, judgements))
        for measure, _, _ in MEASURES:
            ours = values["clusterbatch"][measure]
            line = {"figure": "metric parity", "collection": name, "measure": measure, "queries": len(judgements)}
            line["mean"] = float(ours.mean())
            for program in ("pytrec_eval", "ranx"):
                if measure in values[program]:
                    line[f"largest difference to {program}"] = float(np.abs(ours - values[program][measure]).max())
            print(json.dumps({**line, "promise": PROMISE, "machine": platform.machine()}), flush=True)


if __name__ == "__main__":
    main()
