"""The tables of bench_grid's runs against scipy's one-sample t test and sums written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks.grid_report import OverCorpora, cells, report, without_furthest

CORPORA = ["a", "b", "c", "c-by-query"]
ARMS = ["cluster-4x", "random"]
SIZES = [32, 256]
SEEDS = 3
# Clusters at 32 gain on b surely, on a beyond the interval of the cell alone.
SHIFTS = {"a": 0.12, "b": 0.3, "c": 0.01, "c-by-query": -0.01}
RATE = {32: 0.003, 256: 0.008}


def scores_of(corpus: str, batch: int, arm: str) -> np.ndarray:
    """Return (S, Q) made-up scores; corpora differ in their number of queries."""
    random = np.random.default_rng([CORPORA.index(corpus), batch, ["source", *ARMS].index(arm)])
    queries = 30 + 5 * CORPORA.index(corpus)
    shift = SHIFTS[corpus] if (arm, batch) == ("cluster-4x", 32) else 0.02 * (batch == 256)
    return np.round(0.4 + shift + 0.1 * random.standard_normal((SEEDS, queries)), 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [
        {"corpus": corpus, "batch": batch, "arm": arm, "seed": seed, "rate": RATE[batch], "scores": scores.tolist()}
        for corpus in CORPORA
        for batch in SIZES
        for arm in ["source", *ARMS]
        for seed, scores in enumerate(scores_of(corpus, batch, arm))
    ]
    # A corpus whose baseline has not finished has no cell.
    lines.append({**lines[-1], "corpus": "late", "arm": "random"})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def by_hand(arm: np.ndarray, other: np.ndarray) -> tuple[float, float, float, float]:
    """Return the mean difference of (S, Q) scores, its 95 % interval and p value, with Satterthwaite's freedom."""
    difference = arm - other
    seeds, queries = difference.shape
    of_queries = np.var(difference.mean(0), ddof=1) / queries
    of_seeds = np.var(difference.mean(1), ddof=1) / seeds
    freedom = (of_queries + of_seeds) ** 2 / (of_queries**2 / (queries - 1) + of_seeds**2 / (seeds - 1))
    error = np.sqrt(of_queries + of_seeds)
    low, high = stats.t.interval(0.95, freedom, difference.mean(), error)
    return difference.mean(), low, high, 2 * stats.t.cdf(-abs(difference.mean()) / error, freedom)


def rows_of(text: str, title: str) -> list[list[str]]:
    """Return the cells of the rows of the table below a title."""
    _, below = text.split(title, 1)
    table = below.split("\n\n")[1]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def spoken(mean: float, low: float, high: float, digits: int) -> str:
    return f"{mean:+.4f} ({low:+.{digits}f} to {high:+.{digits}f})"


def test_cells_have_intervals_of_their_queries_and_seeds(folder: Path) -> None:
    found = {(cell.corpus, cell.batch, cell.arm): cell for cell in cells(folder)}
    assert len(found) == len(CORPORA) * len(SIZES) * len(ARMS)
    for (corpus, batch, arm), cell in found.items():
        own, source = scores_of(corpus, batch, arm), scores_of(corpus, batch, "source")
        mean, low, high, p = by_hand(own, source)
        assert (cell.mean, cell.source) == pytest.approx((own.mean(), source.mean()))
        assert (cell.gain.mean, *(cell.interval or ()), cell.gain.p_value()) == pytest.approx((mean, low, high, p))
        assert (cell.seeds, cell.queries) == own.shape


def test_every_gain_and_every_mean_over_corpora_is_in_the_tables(folder: Path) -> None:
    text = report(folder, [*CORPORA, "late"], SIZES, ARMS, [])
    hands = {
        (corpus, batch, arm): by_hand(scores_of(corpus, batch, arm), scores_of(corpus, batch, "source"))
        for corpus in CORPORA
        for batch in SIZES
        for arm in ARMS
    }
    for arm in ARMS:
        for corpus, row in zip(CORPORA, rows_of(text, f"{arm} less source"), strict=True):
            held_out = "queries" if corpus.endswith("-by-query") else "documents"
            assert row[:2] == [corpus.removesuffix("-by-query"), held_out]
            for batch, words in zip(SIZES, row[3:], strict=True):
                mean, low, high, _ = hands[corpus, batch, arm]
                assert words.strip("*") == spoken(mean, low, high, 3)
                assert words.startswith("**") == (low > 0 or high < 0)
    means = {(row[0], int(row[1])): row for row in rows_of(text, "Means over corpora")}
    tests = {}
    for arm in ARMS:
        for batch in SIZES:
            gains = {corpus: hands[corpus, batch, arm][0] for corpus in CORPORA}
            tests[arm, batch] = stats.ttest_1samp(list(gains.values()), 0)
            furthest = max(gains, key=lambda corpus: abs(gains[corpus] - np.mean(list(gains.values()))))
            row = means[arm, batch]
            for words, names in (
                (row[2], CORPORA),
                (row[5], ["a", "b", "c"]),
                (row[6], [name for name in CORPORA if name != furthest]),
            ):
                test = stats.ttest_1samp([gains[name] for name in names], 0)
                low, high = test.confidence_interval(0.95)
                mean = float(np.mean([gains[name] for name in names]))
                assert words.startswith(f"{spoken(mean, low, high, 4)}, n {len(names)}")
            assert row[6].endswith(f"(without {furthest})")
            ends = [pick(gains, key=lambda name, of=gains: of[name]) for pick in (min, max)]
            assert row[7:] == [f"{name} {gains[name]:+.4f}" for name in ends]
    # Holm: the rank-th smallest of m values times m - rank, never below an earlier one.
    largest = 0.0
    for rank, key in enumerate(sorted(tests, key=lambda key: tests[key].pvalue)):
        largest = max(largest, min(1.0, (len(tests) - rank) * tests[key].pvalue))
        assert means[key][3] == f"{largest:.2g}"


def test_arms_are_compared_with_another_than_source(folder: Path) -> None:
    text = report(folder, CORPORA, SIZES, ARMS, [], "random")
    hands = {
        (corpus, batch): by_hand(scores_of(corpus, batch, "cluster-4x"), scores_of(corpus, batch, "random"))
        for corpus in CORPORA
        for batch in SIZES
    }
    for corpus, row in zip(CORPORA, rows_of(text, "cluster-4x less random"), strict=True):
        assert [words.strip("*") for words in row[3:]] == [spoken(*hands[corpus, batch][:3], 3) for batch in SIZES]
    means = rows_of(text, "Means over corpora of the gain over random")
    assert [row[:2] for row in means] == [["cluster-4x", str(batch)] for batch in SIZES]
    for batch, row in zip(SIZES, means, strict=True):
        assert row[2].startswith(f"{np.mean([hands[corpus, batch][0] for corpus in CORPORA]):+.4f} (")
    assert "source" not in text


def test_only_cells_that_hold_together_are_confirmed(folder: Path) -> None:
    text = report(folder, CORPORA, SIZES, ARMS, [])
    p_values = {
        (arm, corpus, batch): by_hand(scores_of(corpus, batch, arm), scores_of(corpus, batch, "source"))[3]
        for corpus in CORPORA
        for batch in SIZES
        for arm in ARMS
    }
    confirmed = []
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        if p_values[key] > 0.05 / (len(p_values) - rank):
            break
        confirmed.append(key)
    assert ("cluster-4x", "b", 32) in confirmed
    rows = rows_of(text, f"Of {len(p_values)} cells")
    assert [(row[0], row[1], int(row[2])) for row in rows] == confirmed
    beyond = [key for key, p in p_values.items() if p < 0.05]
    assert len(beyond) > len(confirmed)
    gains = [key for key in beyond if scores_of(key[1], key[2], key[0]).mean() > scores_of(*key[1:], "source").mean()]
    assert f"{len(gains)} gain and {len(beyond) - len(gains)} lose" in text


def test_larger_batches_of_sources_are_paired_with_smaller_ones_of_arms(folder: Path) -> None:
    text = report(folder, CORPORA, SIZES, ["cluster-4x"], [])
    *rows, last = rows_of(text, "source at batch 256 less each at batch 32")
    for column, arm in enumerate(["source", "cluster-4x"], 2):
        hands = [by_hand(scores_of(name, 256, "source"), scores_of(name, 32, arm)) for name in CORPORA]
        assert [row[column] for row in rows] == [spoken(*hand[:3], 3) for hand in hands]
        means = [hand[0] for hand in hands]
        low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        assert last[column] == f"{spoken(float(np.mean(means)), low, high, 4)}, n 4"


def test_batches_of_sources_alone_are_compared_with_smaller_ones(folder: Path) -> None:
    path = folder / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [run for run in runs if run["batch"] == 32 or run["arm"] == "source"]
    path.write_text("".join(json.dumps(run) + "\n" for run in kept))
    text = report(folder, CORPORA, SIZES, ["cluster-4x"], [])
    *rows, _ = rows_of(text, "source at batch 256 less each at batch 32")
    hands = [by_hand(scores_of(name, 256, "source"), scores_of(name, 32, "cluster-4x")) for name in CORPORA]
    assert [row[3] for row in rows] == [spoken(*hand[:3], 3) for hand in hands]
    assert "| corpus | new in the test | queries | batch 32 |\n" in text


def test_rates_are_not_mixed(folder: Path) -> None:
    run = {"corpus": "a", "batch": 32, "seed": 0, "rate": 0.1, "scores": [0.5, 0.6]}
    with (folder / "runs.jsonl").open("a") as file:
        file.writelines(json.dumps({**run, "arm": arm}) + "\n" for arm in ("source", "random"))
    with pytest.raises(ValueError, match="several learning rates at batch 32"):
        report(folder, CORPORA, SIZES, ARMS, [])
    single = report(folder, CORPORA, SIZES, ARMS, [0.1])
    assert "| a | documents | 2 |" in single
    # One corpus has no mean over corpora, and one seed confirms nothing: no table is empty.
    assert "Means" not in single
    assert single.count("\n| --- ") == 1
    with pytest.raises(ValueError, match="has finished"):
        report(folder, CORPORA, [64], ARMS, [])


def test_one_corpus_has_no_mean() -> None:
    assert OverCorpora.of([0.1]) is None
    assert without_furthest({"a": 0.0, "b": 0.1, "c": -0.5})[0] == "c"
