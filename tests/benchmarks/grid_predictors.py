"""Do figures of the batches foretell what clusters gain? For the finished cells of bench_grid, without training.

    python -m tests.benchmarks.grid_predictors FOLDER

Figures of batches in the surrogate's space, those of clusters (`cluster-4x`, then `cluster-4x-half`) less those of
`source`, and their rank correlation with the measured gain, over all cells and with each corpus left out; the same for
linear fits that leave each corpus out, with the share of the signs beyond noise that they have right and their error
beside the gains' own deviation. JSON lines.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from tests.benchmarks.figures import emit
from tests.benchmarks.grid_arms import Arms
from tests.benchmarks.grid_corpora import CORPORA
from tests.benchmarks.grid_report import BASELINE, BY_QUERY, Cell, cells
from tests.benchmarks.static_trainer import Pairs

ARMS = ("cluster-4x", "cluster-4x-half")
# Near copies: cosines from here on.
_COPIES = 0.9
_ROWS, _TEMPERATURE = 4000, 0.05


def batch_figures(pairs: Pairs, batches: np.ndarray) -> dict[str, float]:
    """Return means over the rows of batches (n, B).

    loss: InfoNCE of the surrogate's scores, in nats; hardest: highest score of another document; wrong: share of the
    queries that score another document above their own; answers: number of such documents; document_copies,
    query_copies: number of near copies of a row's document and query.
    """
    found = []
    for rows in batches:
        query, document = pairs.query_vector[rows], pairs.document_vector[rows]
        same = pairs.query_hash[rows][:, None] == pairs.query_hash[rows]
        same |= pairs.document_hash[rows][:, None] == pairs.document_hash[rows]
        scores = query @ document.T
        own = scores.diagonal()[:, None]
        other = np.where(same, -1.0, scores)
        found.append(
            {
                "loss": np.log1p((np.exp((scores - own) / _TEMPERATURE) * ~same).sum(1)).mean(),
                "hardest": other.max(1).mean(),
                "wrong": (other.max(1) > own[:, 0]).mean(),
                "answers": (other > own).sum(1).mean(),
                "document_copies": ((document @ document.T >= _COPIES) & ~same).sum(1).mean(),
                "query_copies": ((query @ query.T >= _COPIES) & ~same).sum(1).mean(),
            }
        )
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def differences(arms: Arms, arm: str, batch: int) -> dict[str, float]:
    """Return the figures of batches of an arm less those of batches of sources, and facts of the corpus."""
    both = []
    for each in (arm, BASELINE):
        batches = arms.batches(each, batch, 0, most=_ROWS // batch)
        assert batches is not None
        both.append(batch_figures(arms.corpus.pairs, batches))
    corpus = arms.corpus
    return {
        **{name: both[0][name] - both[1][name] for name in both[0]},
        "smaller_batch": -float(np.log2(batch)),
        "by_query": float(CORPORA[corpus.name][1] == "query"),
        "rows_of_a_source": float(np.log(len(corpus.source) / len(np.unique(corpus.source)))),
        "pairs_of_a_document": len(corpus.source) / len(np.unique(corpus.pairs.document_hash)),
    }


def left_out(figures: np.ndarray, gains: np.ndarray, corpora: np.ndarray) -> np.ndarray:
    """Return the gains (N,) that linear fits to the other corpora foretell; figures: (N, K)."""
    found = np.empty(len(gains))
    for name in np.unique(corpora):
        others = corpora != name
        design = np.column_stack([np.ones(others.sum()), figures[others]])
        fitted = np.linalg.lstsq(design, gains[others], rcond=None)[0]
        found[~others] = np.column_stack([np.ones((~others).sum()), figures[~others]]) @ fitted
    return found


def correlation(foretold: np.ndarray, gains: np.ndarray) -> float:
    """Return Spearman's rank correlation of (N,) and (N,)."""
    return float(spearmanr(foretold, gains).statistic)


def judge(arm: str, cells_of_arm: list[Cell], names: list[str], figures: np.ndarray) -> None:
    """Print how well figures (N, K) of these names, and fits to them, foretell the gains of the arm's N cells."""
    gains = np.array([cell.gain.mean for cell in cells_of_arm])
    corpora = np.array([cell.corpus.removesuffix(BY_QUERY) for cell in cells_of_arm])
    for place, name in enumerate(names):
        figure = figures[:, place]
        without = [correlation(figure[corpora != each], gains[corpora != each]) for each in np.unique(corpora)]
        emit(
            "grid, rank correlation of a figure and the measured gain",
            correlation(figure, gains),
            "Spearman",
            case=f"{arm}, {name}",
            cells=len(gains),
            lowest_without_a_corpus=min(without),
            highest_without_a_corpus=max(without),
        )
    beyond_noise = np.array([cell.is_beyond_noise for cell in cells_of_arm])
    best = max(
        (choice for count in (1, 2, 3) for choice in combinations(range(len(names)), count)),
        key=lambda choice: correlation(left_out(figures[:, choice], gains, corpora), gains),
    )
    for case, choice in (
        ("all figures", tuple(range(len(names)))),
        ("loss", (names.index("loss"),)),
        ("wrong", (names.index("wrong"),)),
        ("the best three", best),
    ):
        foretold = left_out(figures[:, choice], gains, corpora)
        emit(
            "grid, gain foretold by a fit to the other corpora",
            correlation(foretold, gains),
            "Spearman",
            case=f"{arm}, {case}",
            figures=[names[place] for place in choice],
            signs_right=float(np.mean(np.sign(foretold[beyond_noise]) == np.sign(gains[beyond_noise]))),
            cells_beyond_noise=int(beyond_noise.sum()),
            gains_among_them=int((gains[beyond_noise] > 0).sum()),
            error=float(np.sqrt(np.mean((foretold - gains) ** 2))),
            deviation=float(gains.std()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    kept = folder / "figures.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    measured = [cell for cell in cells(folder) if cell.arm in ARMS and cell.seeds > 1]
    arms_of = lru_cache(maxsize=1)(lambda corpus: Arms(folder, corpus))
    for cell in sorted(measured, key=lambda cell: cell.corpus):
        if _key(cell) not in known:
            known[_key(cell)] = differences(arms_of(cell.corpus), cell.arm, cell.batch)
            kept.write_text(json.dumps(known))
    for arm in ARMS:
        own = [cell for cell in measured if cell.arm == arm]
        if own:
            names = list(known[_key(own[0])])
            judge(arm, own, names, np.array([[known[_key(cell)][name] for name in names] for cell in own]))


def _key(cell: Cell) -> str:
    return f"{cell.corpus}, batch {cell.batch}, {cell.arm}"


if __name__ == "__main__":
    main()
