"""Do figures of the batches foretell what clusters gain? For the finished cells of bench_grid, without training.

    python -m tests.benchmarks.grid_predictors FOLDER

Figures of batches in the surrogate's space, those of `cluster-4x` less those of `source`, and their rank correlation
with the measured gain; the same for linear fits that leave each corpus out, with the share of the signs beyond noise
that they have right and their error beside the gains' own deviation. JSON lines.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from tests.benchmarks.bench_grid import CORPORA, Study
from tests.benchmarks.figures import emit
from tests.benchmarks.grid_report import cells
from tests.benchmarks.static_trainer import Pairs

ARM = "cluster-4x"
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


def differences(study: Study, batch: int) -> dict[str, float]:
    """Return the figures of batches of clusters less those of batches of sources, and facts of the corpus."""
    both = []
    for arm in (ARM, "source"):
        batches = study.batches(arm, batch, 0, most=_ROWS // batch)
        assert batches is not None
        both.append(batch_figures(study.corpus.pairs, batches))
    corpus = study.corpus
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    kept = folder / "figures.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    measured = [cell for cell in cells(folder) if cell["arm"] == ARM and cell["seeds"] > 1]
    study_of = lru_cache(maxsize=1)(lambda corpus: Study(folder, corpus))
    for cell in sorted(measured, key=lambda cell: cell["corpus"]):
        key = f"{cell['corpus']}, batch {cell['batch']}"
        if key not in known:
            known[key] = differences(study_of(cell["corpus"]), cell["batch"])
            kept.write_text(json.dumps(known))
    names = list(next(iter(known.values())))
    figures = np.array(
        [[known[f"{cell['corpus']}, batch {cell['batch']}"][name] for name in names] for cell in measured]
    )
    gains, errors = (np.array([cell[key] for cell in measured]) for key in ("gain", "error"))
    corpora = np.array([cell["corpus"].removesuffix("-by-query") for cell in measured])
    for place, name in enumerate(names):
        rho = float(spearmanr(figures[:, place], gains).statistic)
        emit("grid, rank correlation of a figure and the measured gain", rho, "Spearman", case=name, cells=len(gains))
    beyond_noise = np.abs(gains) > 1.96 * errors
    best = max(
        (choice for count in (1, 2, 3) for choice in combinations(range(len(names)), count)),
        key=lambda choice: spearmanr(left_out(figures[:, choice], gains, corpora), gains).statistic,
    )
    for case, choice in (
        ("all figures", tuple(range(len(names)))),
        ("loss", (0,)),
        ("wrong", (2,)),
        ("the best three", best),
    ):
        foretold = left_out(figures[:, choice], gains, corpora)
        emit(
            "grid, gain foretold by a fit to the other corpora",
            float(spearmanr(foretold, gains).statistic),
            "Spearman",
            case=case,
            figures=[names[place] for place in choice],
            signs_right=float(np.mean(np.sign(foretold[beyond_noise]) == np.sign(gains[beyond_noise]))),
            error=float(np.sqrt(np.mean((foretold - gains) ** 2))),
            deviation=float(gains.std()),
        )


if __name__ == "__main__":
    main()
