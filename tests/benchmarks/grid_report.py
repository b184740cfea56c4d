"""Tables of the runs of bench_grid: gains of every cell, their means over corpora, and what a larger batch gains.

A cell is an arm at a batch size on a corpus; its gain is over `source` (or another arm) at the same size and rate,
from the seeds that both have. The interval of a cell allows for other queries and other seeds, on this corpus; that of
a mean over corpora (t) for other corpora, of which those held out by document and by query are counted as two.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from clusterbatch.experiments.compare.statistics import Spread, difference, holm

BASELINE = "source"
BY_QUERY = "-by-query"
# Runs of one arm: scores (Q,) by seed.
Seeds = dict[int, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """An arm beside `source` or another baseline; mean, source: NDCG@10 of both, over the same seeds."""

    corpus: str
    batch: int
    arm: str
    rate: float
    seeds: int
    queries: int
    mean: float
    source: float
    gain: Spread

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of this cell alone; None from one seed."""
        return self.gain.interval(0.95) if self.gain.is_known else None

    @property
    def is_beyond_noise(self) -> bool:
        """Return whether there is an interval, and it excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def finished(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the runs that are finished; the first ones recorded no temperature, and all had the same."""
    path = folder / "runs.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        yield {"temperature": 0.05, **json.loads(line)}


def read_runs(folder: Path) -> dict[tuple[str, int, float], dict[str, Seeds]]:
    """Return the finished runs by (corpus, batch, rate), then by arm."""
    runs: dict[tuple[str, int, float], dict[str, Seeds]] = {}
    for run in finished(folder):
        of_arms = runs.setdefault((run["corpus"], run["batch"], run["rate"]), {})
        of_arms.setdefault(run["arm"], {})[run["seed"]] = np.array(run["scores"])
    return runs


def gain_over(arm: Seeds, other: Seeds) -> tuple[Spread, np.ndarray, np.ndarray] | None:
    """Return the difference and the scores (S, Q) of both, from the seeds that both have; None if there is none."""
    seeds = sorted(arm.keys() & other.keys())
    if not seeds:
        return None
    own, base = (np.array([of[seed] for seed in seeds]) for of in (arm, other))
    return difference([own], [base]), own, base


def cells(folder: Path, baseline: str = BASELINE) -> list[Cell]:
    """Return the cells of all arms that have the baseline beside them."""
    found = []
    for (corpus, batch, rate), arms in read_runs(folder).items():
        for arm, own in arms.items():
            compared = gain_over(own, arms.get(baseline, {}))
            if arm == baseline or compared is None:
                continue
            gain, scores, base = compared
            means = float(scores.mean()), float(base.mean())
            found.append(Cell(corpus, batch, arm, rate, len(scores), scores.shape[1], *means, gain))
    return found


@dataclass(frozen=True)
class OverCorpora:
    """Mean of n gains, one of each corpus, with a 95 % t interval over corpora and the p value of a mean of zero."""

    mean: float
    low: float
    high: float
    p: float
    corpora: int

    @staticmethod
    def of(gains: Collection[float]) -> OverCorpora | None:
        """Return it; None of fewer than two corpora."""
        if len(gains) < 2:
            return None
        values = np.array(list(gains))
        error = values.std(ddof=1) / len(values) ** 0.5
        half = stats.t.ppf(0.975, len(values) - 1) * error
        p = 2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1)
        return OverCorpora(values.mean(), values.mean() - half, values.mean() + half, float(p), len(values))

    def __str__(self) -> str:
        return f"{_signed(self.mean, (self.low, self.high), 4)}, n {self.corpora}"


def without_furthest(gains: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Return the corpus whose gain lies furthest from the mean of all, and the gains of the others."""
    mean = np.mean(list(gains.values()))
    furthest = max(gains, key=lambda corpus: abs(gains[corpus] - mean))
    return furthest, {corpus: gain for corpus, gain in gains.items() if corpus != furthest}


def gains_of(wanted: Sequence[Cell]) -> dict[tuple[str, int], dict[str, float]]:
    """Return the gains by (arm, batch), then by corpus."""
    gains: dict[tuple[str, int], dict[str, float]] = {}
    for cell in wanted:
        gains.setdefault((cell.arm, cell.batch), {})[cell.corpus] = cell.gain.mean
    return gains


def rates_of_sizes(
    folder: Path, corpora: Collection[str], sizes: Collection[int], rates: Collection[float]
) -> dict[int, float]:
    """Return the learning rate of `source` at each batch size; rates: those to choose from, none means any.

    Raises ValueError if a batch size has runs of several rates.
    """
    # Batches of `source` alone count: larger ones are compared with smaller ones of the arms.
    rate_of: dict[int, float] = {}
    for corpus, batch, rate in (key for key, of_arms in read_runs(folder).items() if BASELINE in of_arms):
        if corpus not in corpora or batch not in sizes or (rates and rate not in rates):
            continue
        if rate_of.setdefault(batch, rate) != rate:
            raise ValueError(f"runs of several learning rates at batch {batch}: choose with --rates")
    return rate_of


def report(
    folder: Path,
    corpora: Sequence[str],
    sizes: Sequence[int],
    arms: Sequence[str],
    rates: Sequence[float],
    baseline: str = BASELINE,
) -> str:
    """Return the tables as Markdown, of the runs asked for; rates: none means any.

    Raises ValueError if a batch size has runs of several rates, or nothing asked for has finished.
    """
    wanted = [
        cell
        for cell in cells(folder, baseline)
        if cell.corpus in corpora and cell.batch in sizes and cell.arm in arms and (not rates or cell.rate in rates)
    ]
    if not wanted:
        raise ValueError(f"no arm beside `{baseline}` has finished there")
    rate_of = rates_of_sizes(folder, corpora, sizes, rates)
    arms, corpora = (
        [each for each in names if any(each in (c.arm, c.corpus) for c in wanted)] for names in (arms, corpora)
    )
    parts = [_gains(wanted, arm, baseline, corpora, sorted({cell.batch for cell in wanted})) for arm in arms]
    parts += [_confirmed(wanted), _means(wanted, arms, baseline)]
    if len(rate_of) > 1 and baseline == BASELINE:
        parts += [_larger_batches(folder, rate_of, arms, corpora)]
    return "\n\n".join(part for part in parts if part)


def _gains(wanted: list[Cell], arm: str, baseline: str, corpora: Sequence[str], sizes: Sequence[int]) -> str:
    own = {(cell.corpus, cell.batch): cell for cell in wanted if cell.arm == arm}
    rows = []
    for corpus in corpora:
        of_corpus = [own.get((corpus, size)) for size in sizes]
        queries = next((cell.queries for cell in of_corpus if cell), 0)
        if queries:
            rows.append([*_named(corpus), f"{queries:,}", *map(_cell, of_corpus)])
    sizes_named = [f"batch {sizes[0]}", *map(str, sizes[1:])]
    return f"{arm} less {baseline}, NDCG@10; bold: beyond the interval of the cell alone\n\n" + _table(
        ["corpus", "new in the test", "queries", *sizes_named], rows
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    words = _signed(cell.gain.mean, cell.interval, 3)
    return f"**{words}**" if cell.is_beyond_noise else words


def _confirmed(wanted: list[Cell]) -> str:
    """Return the cells that Holm's correction over all of them leaves."""
    known = [cell for cell in wanted if cell.gain.is_known]
    adjusted = holm([cell.gain.p_value() for cell in known])
    rows = [
        [cell.arm, cell.corpus, str(cell.batch), f"{cell.gain.mean:+.4f}", f"{p:.2g}"]
        for p, cell in sorted(zip(adjusted, known, strict=True), key=lambda pair: pair[0])
        if p <= 0.05
    ]
    beyond = [cell.gain.mean > 0 for cell in known if cell.is_beyond_noise]
    title = (
        f"Of {len(known)} cells {sum(beyond)} gain and {len(beyond) - sum(beyond)} lose beyond their own intervals; "
        f"with all of them together (Holm, p <= .05) {len(rows)} do"
    )
    return f"{title}\n\n" + _table(["arm", "corpus", "batch", "gain", "adjusted p"], rows) if rows else title


def _means(wanted: list[Cell], arms: Sequence[str], baseline: str) -> str:
    """Return the means over corpora of every arm; nothing of a single corpus."""
    gains, lines = gains_of(wanted), []
    for arm in arms:
        for (name, size), of_corpora in sorted(gains.items(), key=lambda item: item[0][1]):
            if name == arm and (every := OverCorpora.of(of_corpora.values())):
                lines.append((arm, size, every, of_corpora))
    if not lines:
        return ""
    rows = []
    for (arm, size, every, of_corpora), p in zip(lines, holm([line[2].p for line in lines]), strict=True):
        documents = [gain for corpus, gain in of_corpora.items() if not corpus.endswith(BY_QUERY)]
        furthest, others = without_furthest(of_corpora)
        positive = f"{sum(gain > 0 for gain in of_corpora.values())} of {len(of_corpora)}"
        few = [OverCorpora.of(documents), OverCorpora.of(others.values())]
        spoken = [str(each) if each else "" for each in few]
        extremes = [
            f"{pick(of_corpora, key=of_corpora.__getitem__)} {pick(of_corpora.values()):+.4f}" for pick in (min, max)
        ]
        without = f"{spoken[1]} (without {furthest})"
        rows.append([arm, str(size), str(every), f"{p:.2g}", positive, spoken[0], without, *extremes])
    head = [
        "arm",
        "batch",
        "mean gain",
        "adjusted p",
        "positive",
        "held out by document",
        "without the furthest corpus",
        "worst",
        "best",
    ]
    return f"Means over corpora of the gain over {baseline}, with t intervals over corpora\n\n" + _table(head, rows)


def _larger_batches(folder: Path, rate_of: dict[int, float], arms: Sequence[str], corpora: Sequence[str]) -> str:
    """Return what the largest batches of `source` gain over every arm at 32 (or the smallest size), at equal pairs."""
    arms = [BASELINE, *arms]
    runs, large = read_runs(folder), max(rate_of)
    small = 32 if 32 in rate_of and large > 32 else min(rate_of)
    rows: list[Sequence[str]] = []
    columns: list[list[float]] = [[] for _ in arms]
    for corpus in corpora:
        row = list(_named(corpus))
        for arm, column in zip(arms, columns, strict=True):
            source = runs.get((corpus, large, rate_of[large]), {}).get(BASELINE, {})
            compared = gain_over(source, runs.get((corpus, small, rate_of[small]), {}).get(arm, {}))
            if compared is None:
                row.append("")
                continue
            gain = compared[0]
            column.append(gain.mean)
            interval = gain.interval(0.95) if gain.is_known else None
            row.append(_signed(gain.mean, interval, 3))
        rows.append(row)
    means = ["mean, t interval over corpora", "", *(str(OverCorpora.of(column) or "") for column in columns)]
    title = f"{BASELINE} at batch {large} less each at batch {small}, NDCG@10 at equal pairs"
    return f"{title}\n\n" + _table(["corpus", "new in the test", *arms], [*rows, means])


def _named(corpus: str) -> tuple[str, str]:
    """Return the corpus and what its test has that training has not."""
    return (corpus.removesuffix(BY_QUERY), "queries" if corpus.endswith(BY_QUERY) else "documents")


def _signed(mean: float, interval: tuple[float, float] | None, digits: int) -> str:
    if interval is None:
        return f"{mean:+.4f}"
    low, high = (f"{bound:+.{digits}f}" for bound in interval)
    return f"{mean:+.4f} ({low} to {high})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
