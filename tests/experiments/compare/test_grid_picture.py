"""The picture of the study of batch sizes: what it says against means written out by hand."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from tests.benchmarks import bench_grid
from tests.benchmarks.bench_grid import RATES
from tests.benchmarks.grid_picture import doublings, picture

CORPORA = ["code", "medquad", "tldr", "msdocs-by-query"]
SIZES = [16, 32, 64]
ARMS = ["cluster-4x", "cluster-4x-half", "cluster-8x", "cluster-16x-half"]
WHOLE, HALF, DOUBLED = "batches of one cluster", "half of every batch of one cluster", "twice as large"
SVG = "{http://www.w3.org/2000/svg}"


def mean_of(corpus: str, batch: int, arm: str) -> float:
    """Return a made-up score. Clusters of 8 batches gain on all corpora alike, those of 4 at 64 have not been run."""
    plain = 0.4 + 0.01 * SIZES.index(batch) ** 1.5 * (2 + CORPORA.index(corpus))
    if arm == "source":
        return plain
    gain = 0.03 if arm == "cluster-8x" else 0.0
    noise = np.random.default_rng([CORPORA.index(corpus), batch, ARMS.index(arm)]).standard_normal()
    return plain + gain + (0.002 if gain else 0.02) * float(noise)


def has(batch: int, arm: str) -> bool:
    return (batch, arm) != (64, "cluster-16x-half")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spread = np.array([[-1, 0, 1], [1, 0, -1], [0, 1, -1]]) / 100
    lines = [
        {"corpus": corpus, "batch": batch, "arm": arm, "seed": seed, "rate": RATES[batch], "scores": scores.tolist()}
        for corpus in CORPORA
        for batch in SIZES
        for arm in ["source", *ARMS]
        if has(batch, arm)
        for seed, scores in enumerate(mean_of(corpus, batch, arm) + spread)
    ]
    # Corpora on which rates were chosen have runs at several.
    lines += [{**lines[0], "corpus": "movies", "rate": rate} for rate in (0.001, 0.002)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def texts_of(svg: str) -> list[tuple[str, bool]]:
    """Return the texts, and whether each is bold."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [("".join(text.itertext()).strip(), "font-weight: 700" in text.attrib["style"]) for text in found]


def test_means_of_every_batch_and_cluster_size_are_in_the_map(folder: Path) -> None:
    texts = texts_of(picture(folder, CORPORA, []))
    expected = []
    for batch in SIZES:
        for arm in ARMS:
            if has(batch, arm):
                gains = [mean_of(corpus, batch, arm) - mean_of(corpus, batch, "source") for corpus in CORPORA]
                low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
                expected.append((f"{np.mean(gains):+.4f}", bool(low > 0 or high < 0)))
    assert {bold for _, bold in expected} == {True, False}
    # The colour bar has three digits.
    shown = [(text.replace("\N{MINUS SIGN}", "-"), bold) for text, bold in texts]
    found = [(text, bold) for text, bold in shown if len(text) == 7 and text[0] in "+-" and text[2] == "."]
    assert sorted(found) == sorted(expected)
    assert [text for text, _ in texts].count("4 corpora") == len(expected)


def test_the_corpora_farthest_from_the_others_are_named(folder: Path) -> None:
    texts = [text for text, _ in texts_of(picture(folder, CORPORA, []))]
    gains = {
        corpus: [mean_of(corpus, batch, "cluster-4x") - mean_of(corpus, batch, "source") for batch in SIZES]
        for corpus in CORPORA
    }
    for extreme in (max(CORPORA, key=lambda corpus: max(gains[corpus])), min(CORPORA, key=lambda c: min(gains[c]))):
        assert extreme.replace("-by-query", ", new queries") in texts


def test_doublings_are_those_of_plain_batches(folder: Path) -> None:
    found = doublings(folder, {batch: RATES[batch] for batch in SIZES}, CORPORA)
    for batch in (16, 32):
        expected = {name: mean_of(name, 2 * batch, "source") - mean_of(name, batch, "source") for name in CORPORA}
        assert found[batch] == pytest.approx(expected)
    assert list(found) == [16, 32]


def test_the_same_runs_make_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "picture.svg"
    words = ["bench_grid", str(folder), "--corpora", ",".join(CORPORA), "--picture", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    bench_grid.main()
    svg = file.read_text()
    assert svg == picture(folder, CORPORA, [])
    assert "date" not in svg.lower()
    # Vectors alone: an image in it would blur.
    assert "<image" not in svg


@pytest.mark.parametrize(
    ("arms", "batches", "panels"),
    [
        (["source", "cluster-4x"], SIZES, [WHOLE, DOUBLED]),
        (["source", "cluster-4x"], [32], [WHOLE]),
        (["source", "cluster-4x", "cluster-8x"], [32], [WHOLE, WHOLE, HALF]),
    ],
)
def test_an_unfinished_study_has_a_picture_of_what_there_is(
    folder: Path, arms: list[str], batches: list[int], panels: list[str]
) -> None:
    path = folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [run for run in runs if run["arm"] in arms and run["batch"] in batches]
    path.write_text("".join(json.dumps(run) + "\n" for run in kept))
    texts = [text for text, _ in texts_of(picture(folder, CORPORA, []))]
    assert [text for text in texts if text in (WHOLE, HALF, DOUBLED)] == panels
    assert ("mean size of a cluster" in texts) == ("cluster-8x" in arms)


def test_runs_of_several_rates_are_not_mixed(folder: Path) -> None:
    path = folder / "runs.jsonl"
    run = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**run, "rate": 0.1}) + "\n")
    with pytest.raises(ValueError, match="several learning rates at batch 16"):
        picture(folder, CORPORA, [])
    path.write_text("")
    with pytest.raises(ValueError, match="have finished"):
        picture(folder, CORPORA, [])
