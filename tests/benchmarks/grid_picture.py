"""Picture of the runs of bench_grid: gains by batch size, and means over corpora by batch and cluster size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure

from tests.benchmarks.grid_report import (
    BASELINE,
    BY_QUERY,
    OverCorpora,
    cells,
    gain_over,
    gains_of,
    rates_of_sizes,
    read_runs,
)

# Gains of one line: by batch size, then by corpus.
Gains = dict[int, dict[str, float]]

TIMES = (4, 8, 16, 32)
_HALF = "-half"
# Okabe and Ito's, told apart by most colour-blind readers.
_TITLES = ("batches of one cluster", "half of every batch of one cluster", "super-batches of 16", "twice as large")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#6B6B6B")
_MARKERS = "osD^"
INK, _FAINT = "#1c2330", "#b4bac4"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    # Text stays text: smaller, and it can be searched. The same runs make the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "clusterbatch",
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}
# Steps of the heat map's colours, in NDCG@10; the outermost are for all beyond.
_LEVELS = np.array([-0.02, -0.015, -0.01, -0.006, -0.003, -0.001, 0.001, 0.003, 0.006, 0.01, 0.015, 0.02])


def picture(folder: Path, corpora: Sequence[str], rates: Sequence[float]) -> str:
    """Return the SVG of the runs of these corpora, without the parts that have none; rates: none means any.

    Raises ValueError if a batch size has runs of several rates, or no clusters of four batches have finished.
    """
    runs = read_runs(folder)
    sizes = {batch for _, batch, _ in runs}
    rate_of = rates_of_sizes(folder, corpora, sizes, rates)
    gains = gains_of(
        [each for each in cells(folder) if each.corpus in corpora and rate_of.get(each.batch) == each.rate]
    )
    lines = [
        _by_batch(gains, "cluster-4x"),
        _by_batch(gains, f"cluster-4x{_HALF}"),
        _by_batch(gains, "super-16x"),
        doublings(folder, rate_of, corpora),
    ]
    if not lines[0]:
        raise ValueError("no clusters of four batches have finished there")
    has_map = any(
        f"cluster-{times}x{suffix}" == name for times in TIMES[1:] for suffix in ("", _HALF) for name, _ in gains
    )
    with matplotlib.rc_context(STYLE):
        # White, not transparent: the same on light and dark pages.
        figure = Figure(figsize=(11.2, 6.6 if has_map else 3.4), layout="constrained", facecolor="white")
        rows = figure.subfigures(1 + has_map, 1, height_ratios=[1.15, 1][: 1 + has_map], squeeze=False)[:, 0]
        _draw_lines(rows[0], lines)
        if has_map:
            _draw_maps(rows[1], gains)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def doublings(folder: Path, rate_of: Mapping[int, float], corpora: Sequence[str]) -> Gains:
    """Return what `source` at twice each batch size gains, at equal pairs."""
    runs, found = read_runs(folder), {}
    for batch in sorted(rate_of):
        if 2 * batch not in rate_of:
            continue
        of_corpora = {}
        for corpus in corpora:
            both = (runs.get((corpus, size, rate_of[size]), {}).get(BASELINE, {}) for size in (2 * batch, batch))
            if compared := gain_over(*both):
                of_corpora[corpus] = compared[0].mean
        found[batch] = of_corpora
    return found


def _by_batch(gains: Mapping[tuple[str, int], dict[str, float]], arm: str) -> Gains:
    return {batch: of_corpora for (name, batch), of_corpora in sorted(gains.items()) if name == arm}


def _draw_lines(figure: SubFigure, lines: Sequence[Gains]) -> None:
    """Draw those lines that have finished runs beside each other."""
    shown = [number for number, line in enumerate(lines) if line]
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for each, number in zip(axes, shown, strict=True):
        _draw_line(each, lines[number], _COLOURS[number], _MARKERS[number])
        each.set_title(_TITLES[number], color=_COLOURS[number], fontweight="bold")
        each.set_xlim(*axes[0].get_xlim())
    axes[0].set_ylabel("gain over batches of one source, NDCG@10")


def _draw_maps(figure: SubFigure, gains: Mapping[tuple[str, int], dict[str, float]]) -> None:
    """Draw the maps of whole and of half clusters, with their colour bar."""
    axes = figure.subplots(1, 2, sharey=True)
    for number, (each, suffix) in enumerate(zip(axes, ["", _HALF], strict=True)):
        mesh = _draw_map(each, gains, suffix)
        each.set_title(_TITLES[number], color=_COLOURS[number], fontweight="bold")
    axes[0].set_ylabel("batch size, pairs")
    axes[0].invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, ticks=_LEVELS, format="{x:+.3f}")
    bar.set_label("mean gain over corpora, NDCG@10")
    bar.ax.tick_params(labelsize=7)


def _draw_line(axes: Axes, line: Gains, colour: str, marker: str) -> None:
    """Draw the mean over corpora with its 95 % t interval, thin lines of single corpora behind, two of them named."""
    batches = list(line)
    for corpus in sorted({corpus for of_corpora in line.values() for corpus in of_corpora}):
        own = [batch for batch in batches if corpus in line[batch]]
        axes.plot(own, [line[batch][corpus] for batch in own], color=_FAINT, linewidth=0.8, zorder=1)
    ends = [(gain, batch, corpus) for batch, of_corpora in line.items() for corpus, gain in of_corpora.items()]
    for gain, batch, corpus in {min(ends), max(ends)}:
        inward = "left" if batch < batches[-1] else "right"
        above = gain > 0
        axes.annotate(
            _named(corpus),
            (batch, gain),
            (0, 4 if above else -4),
            textcoords="offset points",
            ha=inward,
            va="bottom" if above else "top",
            fontsize=8,
            color="#5b6472",
        )
    means = {batch: OverCorpora.of(of_corpora.values()) for batch, of_corpora in line.items()}
    known = {batch: mean for batch, mean in means.items() if mean}
    low, high, mean = ([getattr(each, name) for each in known.values()] for name in ("low", "high", "mean"))
    axes.fill_between(list(known), low, high, color=colour, alpha=0.25, linewidth=0, zorder=2)
    axes.plot(list(known), mean, color=colour, marker=marker, linewidth=2, zorder=3)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.margins(y=0.08)
    axes.set_xlabel("batch size, pairs")
    axes.yaxis.set_major_formatter("{x:+.2f}")


def _draw_map(axes: Axes, gains: Mapping[tuple[str, int], dict[str, float]], suffix: str) -> QuadMesh:
    """Draw mean gains by batch and cluster size, with the number of corpora; bold: the t interval excludes 0."""
    names = {times: f"cluster-{times}x{suffix}" for times in TIMES}
    # Those of both maps, for they share their rows.
    batches = sorted({batch for name, batch in gains if name.removesuffix(_HALF) in {f"cluster-{n}x" for n in TIMES}})
    values = np.full((len(batches), len(TIMES)), np.nan)
    for row, batch in enumerate(batches):
        for column, times in enumerate(TIMES):
            mean = OverCorpora.of(gains.get((names[times], batch), {}).values())
            if mean is None:
                continue
            values[row, column] = mean.mean
            weight = "normal" if mean.low <= 0 <= mean.high else "bold"
            place = {"xy": (column, row), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{mean.mean:+.4f}", xytext=(0, -2), va="bottom", fontweight=weight, **place)
            axes.annotate(f"{mean.corpora} corpora", xytext=(0, -3), va="top", fontsize=7, **place)
    mesh = axes.pcolormesh(
        np.arange(len(TIMES)),
        np.arange(len(batches)),
        np.ma.masked_invalid(values),
        cmap=matplotlib.colormaps["PuOr_r"].with_extremes(bad="white"),
        norm=BoundaryNorm(_LEVELS, 256, extend="both"),
        edgecolors="white",
        linewidth=1,
    )
    axes.set_xticks(range(len(TIMES)), [f"{times} batches" for times in TIMES])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("mean size of a cluster")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return mesh


def _named(corpus: str) -> str:
    return f"{corpus.removesuffix(BY_QUERY)}, new queries" if corpus.endswith(BY_QUERY) else corpus
