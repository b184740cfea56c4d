"""Tables of masks from made-up runs of the study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from tests.benchmarks.grid_mask_report import mean_gain, report
from tests.benchmarks.grid_report import read_runs


def _write(folder: Path, gains: dict[tuple[str, str], float]) -> None:
    """Write runs of `source` and of masks that gain so much over it on each (corpus, mask)."""
    random = np.random.default_rng(0)
    lines = []
    for corpus in sorted({corpus for corpus, _ in gains}):
        plain = random.uniform(0.2, 0.6, (3, 200))
        arms = {"source": plain} | {
            f"source-{mask}": plain + gain + random.normal(0, 0.01, plain.shape)
            for (name, mask), gain in gains.items()
            if name == corpus
        }
        for arm, scores in arms.items():
            for seed, values in enumerate(scores):
                run = {"corpus": corpus, "batch": 32, "arm": arm, "seed": seed, "rate": 0.003, "masked": 0.25}
                lines.append(json.dumps({**run, "scores": values.tolist()}))
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n")


def test_masks_are_compared_with_the_same_batches_without_one(tmp_path: Path) -> None:
    _write(tmp_path, {("one", "teacher"): 0.1, ("two", "teacher"): 0.2, ("one", "ranks"): -0.1})
    shown = report(tmp_path)
    assert shown.startswith("Of 3 cells, with all of them together (Holm), 2 gain and 1 lose.")
    assert "| one | 32 | source |" in shown
    assert "[25.00%]" in shown
    runs = {(corpus, batch): arms for (corpus, batch, _), arms in read_runs(tmp_path).items()}
    found = mean_gain(runs, "source", "teacher", 32)
    assert found is not None
    gain, corpora = found
    assert corpora == 2
    assert gain.mean == pytest.approx(0.15, abs=0.005)
    assert mean_gain(runs, "source", "apart", 32) is None


def test_corpora_may_be_chosen_and_no_mask_is_said(tmp_path: Path) -> None:
    _write(tmp_path, {("one", "teacher"): 0.1, ("two", "teacher"): 0.2})
    assert "| two |" not in report(tmp_path, ["one"])
    with pytest.raises(ValueError, match="no mask has finished"):
        report(tmp_path, ["three"])
