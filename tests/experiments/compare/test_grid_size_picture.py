"""The picture of gains by the size of a corpus: what it says against means written out by hand."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from scipy import stats

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from tests.benchmarks import bench_grid
from tests.benchmarks.bench_grid import RATES
from tests.benchmarks.grid_size_picture import by_size, size_picture

NAMES, SIZES = ["code", "tldr", "msdocs"], ["1000", "20000", "all"]
CORPORA = [f"{name}:{size}" for name in NAMES for size in SIZES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scores = {"source": [0.4, 0.5], "super-64x": [0.5, 0.5], "cluster-4x": [0.3, 0.5]}
    lines = [
        {"corpus": corpus, "batch": batch, "arm": arm, "seed": seed, "rate": RATES[batch]}
        | {"scores": [score + number / 100 * (arm != "source") for score in found]}
        for number, corpus in enumerate(CORPORA)
        for batch in (32, 128)
        for seed in range(2)
        for arm, found in scores.items()
        if (batch, arm) != (128, "cluster-4x")
    ]
    # A study of other corpora in the same folder has no part in it.
    lines += [{**line, "corpus": "mitre", "batch": 256, "rate": RATES[256]} for line in lines[:3]]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_means_are_over_the_corpora_of_each_size_in_order() -> None:
    gains = {"a:12000": 0.01, "b:12000": 0.03, "c:12000": 0.02, "a:3000": 0.0, "b:3000": 0.01, "a:all": 0.05}
    found = by_size(gains)
    assert list(found) == ["3000", "12000"], "one corpus alone has no interval"
    low, high = stats.ttest_1samp([0.01, 0.03, 0.02], 0).confidence_interval(0.95)
    mean = found["12000"]
    assert (mean.mean, mean.low, mean.high, mean.corpora) == pytest.approx((0.02, low, high, 3))


def test_batch_sizes_and_arms_with_runs_are_in_the_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = folder / "sizes.svg"
    words = ["bench_grid", str(folder), "--corpora", ",".join(CORPORA), "--picture", str(drawn)]
    monkeypatch.setattr(sys, "argv", words)
    bench_grid.main()
    root = ElementTree.parse(drawn).getroot()
    texts = ["".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text.startswith("batches of ") and text[-1].isdigit()] == [
        "batches of 32",
        "batches of 128",
    ]
    assert [text for text in texts if text in ("1,000", "20,000", "all")] == ["1,000", "20,000", "all"] * 2
    assert "super-batches of 64" in texts
    assert "batches of one cluster" in texts
    assert "super-batches of 16" not in texts


def test_nothing_to_draw_is_said(folder: Path) -> None:
    with pytest.raises(ValueError, match="no arm of this picture has finished"):
        size_picture(folder, ["other:all"], [])
