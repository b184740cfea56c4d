"""Gains of masks of likely false negatives in bench_grid: tables of its finished runs, as Markdown. Trains nothing.

    python -m tests.benchmarks.grid_mask_report FOLDER [--corpora medquad,factbook]

The gain of each mask over the same batches without one, and the share of the other rows' documents that it leaves out.
Intervals (95 %) allow for other queries and other seeds, on these corpora.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from itertools import product
from pathlib import Path

import numpy as np

from clusterbatch.experiments.compare.statistics import Spread, difference, holm
from tests.benchmarks.grid_masks import MASKS
from tests.benchmarks.grid_report import Seeds, finished, gain_over, read_runs

STRATEGIES = ("random", "source", "cluster-4x", "cluster-4x-half")
# (corpus, batch)
Place = tuple[str, int]


def gains(runs: dict[Place, dict[str, Seeds]], strategy: str, mask: str, batch: int) -> dict[str, Spread]:
    """Return the gain of the mask over the same strategy without one at this batch size, by corpus."""
    found = {}
    for (corpus, size), arms in runs.items():
        compared = gain_over(arms.get(f"{strategy}-{mask}", {}), arms.get(strategy, {}))
        if size == batch and compared is not None:
            found[corpus] = compared[0]
    return found


def mean_gain(runs: dict[Place, dict[str, Seeds]], strategy: str, mask: str, batch: int) -> tuple[Spread, int] | None:
    """Return the mean over all corpora that have both arms with the same seeds, and how many these are."""
    pairs = [
        (arms[f"{strategy}-{mask}"], arms[strategy])
        for (_, size), arms in runs.items()
        if size == batch and f"{strategy}-{mask}" in arms and strategy in arms
    ]
    seeds = sorted(set.intersection(*(set(own) & set(base) for own, base in pairs))) if pairs else []
    if not seeds:
        return None
    own, base = ([np.array([of[seed] for seed in seeds]) for of in side] for side in zip(*pairs, strict=True))
    return difference(own, base), len(pairs)


def shares(folder: Path) -> dict[tuple[str, int, str], float]:
    """Return the mean share that is left out, by (corpus, batch, arm)."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for run in finished(folder):
        found.setdefault((run["corpus"], run["batch"], run["arm"]), []).append(run.get("masked", 0.0))
    return {key: float(np.mean(each)) for key, each in found.items()}


def report(folder: Path, corpora: Collection[str] = ()) -> str:
    """Return the tables, of these corpora alone if some are named.

    Raises ValueError if no mask has a run beside the same batches without one.
    """
    read = read_runs(folder).items()
    runs = {(corpus, batch): arms for (corpus, batch, _), arms in read if not corpora or corpus in corpora}
    sizes = sorted({batch for _, batch in runs})
    masks = [mask for mask in MASKS if any(arm.endswith(f"-{mask}") for arms in runs.values() for arm in arms)]
    every = {
        (strategy, mask, batch, corpus): gain
        for batch in sizes
        for strategy in STRATEGIES
        for mask in masks
        for corpus, gain in gains(runs, strategy, mask, batch).items()
    }
    if not every:
        raise ValueError("no mask has finished there beside the same batches without one")
    known = [key for key, gain in every.items() if gain.is_known]
    adjusted = dict(zip(known, holm([every[key].p_value() for key in known]), strict=True))
    held = [every[key].mean > 0 for key, p in adjusted.items() if p <= 0.05]
    left_out = shares(folder)
    lines = [
        f"Of {len(known)} cells, with all of them together (Holm), {sum(held)} gain and {held.count(False)} lose.",
        "",
    ]
    lines += [_row(["corpus", "batch", "strategy", "no mask", *masks]), _row(["---"] * (4 + len(masks)))]
    for (corpus, batch), arms in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
        for strategy in STRATEGIES:
            if strategy in arms:
                plain = float(np.mean(list(arms[strategy].values())))
                cells = [_cell(every.get((strategy, mask, batch, corpus))) for mask in masks]
                lines.append(_row([corpus, str(batch), strategy, f"{plain:.4f}", *cells]))
    lines += ["", "Means over the corpora that have the arm; in brackets the share left out.", ""]
    lines += [_row(["batch", "strategy", "corpora", *masks]), _row(["---"] * (3 + len(masks)))]
    for batch, strategy in product(sizes, STRATEGIES):
        cells, most = [], 0
        for mask in masks:
            found = mean_gain(runs, strategy, mask, batch)
            arm = f"{strategy}-{mask}"
            rates = [left_out[place] for place in left_out if place[1:] == (batch, arm) and place[:2] in runs]
            cells.append("" if found is None else f"{_cell(found[0])} [{np.mean(rates):.2%}]")
            most = max(most, 0 if found is None else found[1])
        if most:
            lines.append(_row([str(batch), strategy, str(most), *cells]))
    return "\n".join(lines)


def _cell(gain: Spread | None) -> str:
    if gain is None:
        return ""
    if not gain.is_known:
        return f"{gain.mean:+.4f}"
    low, high = gain.interval(0.95)
    words = f"{gain.mean:+.4f} ({low:+.3f} to {high:+.3f})"
    return words if low <= 0 <= high else f"**{words}**"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpora", default="")
    options = parser.parse_args()
    print(report(options.folder, list(filter(None, options.corpora.split(",")))))


if __name__ == "__main__":
    main()
