"""Picture of runs of bench_grid on corpora of several sizes (NAME:N): gains by the pairs that are trained on."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.grid_picture import INK, STYLE
from tests.benchmarks.grid_report import OverCorpora, cells, gains_of, rates_of_sizes

# Arms of the picture: name, colour (Okabe and Ito's) and marker.
ARMS = {
    "super-64x@live": ("super-batches of 64, second epoch by the model itself", "#CC79A7", "D"),
    "super-64x": ("super-batches of 64", "#009E73", "s"),
    "super-16x": ("super-batches of 16", "#56B4E9", "o"),
    "cluster-4x-half": ("half of every batch of one cluster", "#D55E00", "^"),
    "cluster-4x": ("batches of one cluster", "#0072B2", "v"),
}


def size_picture(folder: Path, corpora: Sequence[str], rates: Sequence[float]) -> str:
    """Return the SVG: a part for each batch size, a line for each arm, with 95 % t intervals over corpora.

    corpora: NAME:N or NAME:all. Raises ValueError if a batch size has runs of several rates, or no arm has finished.
    """
    known = cells(folder)
    rate_of = rates_of_sizes(folder, corpora, {cell.batch for cell in known}, rates)
    gains = gains_of([cell for cell in known if cell.corpus in corpora and rate_of.get(cell.batch) == cell.rate])
    batches = sorted({batch for arm, batch in gains if arm in ARMS})
    if not batches:
        raise ValueError("no arm of this picture has finished there")
    sizes = sorted({corpus.partition(":")[2] for corpus in corpora}, key=_order)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 4.0), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        for each, batch in zip(axes, batches, strict=True):
            lines = {arm: by_size(gains.get((arm, batch), {})) for arm in ARMS}
            _draw(each, {arm: line for arm, line in lines.items() if line}, sizes)
            each.set_title(f"batches of {batch}", fontweight="bold")
        axes[0].set_ylabel("gain over batches of one source, NDCG@10")
        handles = {
            label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def by_size(gains: Mapping[str, float]) -> dict[str, OverCorpora]:
    """Return the mean over corpora for each size that at least two have; gains: of NAME:N."""
    found: dict[str, list[float]] = {}
    for corpus, gain in gains.items():
        found.setdefault(corpus.partition(":")[2], []).append(gain)
    means = {size: OverCorpora.of(found[size]) for size in sorted(found, key=_order)}
    return {size: mean for size, mean in means.items() if mean}


def _order(size: str) -> tuple[bool, int]:
    return size == "all", 0 if size == "all" else int(size)


def _draw(axes: Axes, lines: Mapping[str, Mapping[str, OverCorpora]], sizes: Sequence[str]) -> None:
    for number, (arm, line) in enumerate(lines.items()):
        label, colour, marker = ARMS[arm]
        # Side by side, so that intervals do not cover each other.
        places = [sizes.index(size) + 0.06 * (number - (len(lines) - 1) / 2) for size in line]
        means = [mean.mean for mean in line.values()]
        reach = [[mean.mean - mean.low for mean in line.values()], [mean.high - mean.mean for mean in line.values()]]
        axes.errorbar(places, means, reach, color=colour, marker=marker, linewidth=2, elinewidth=0.8, label=label)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(sizes)), [size if size == "all" else f"{int(size):,}" for size in sizes])
    axes.set_xlabel("pairs trained on")
    axes.yaxis.set_major_formatter("{x:+.2f}")
