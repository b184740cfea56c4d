"""Figures of a comparison, by matplotlib: inline SVG that takes the page's colours and fonts, and PNG and SVG files.

Every arm has a colour (Okabe and Ito's, told apart by most colour-blind readers, on light and dark), a marker and a
line style, so that none of them alone carries the meaning.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from clusterbatch.experiments.compare.cluster_views import MappedCluster
from clusterbatch.experiments.compare.results import Comparison

_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C", "#B8A600"]
_MARKERS = "osD^vPX*"
_LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2))]
_LEGEND_COLUMNS = 3
# Stands for the page's text colour; replaced by currentColor, which follows light and dark.
_INK = "#123456"
# Fonts with Japanese glyphs, as the usual systems call them.
_JAPANESE_FONTS = [
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "Hiragino Sans",
    "Yu Gothic",
    "Meiryo",
    "MS Gothic",
]

Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """`name` is the file's; `title` and `description` are read aloud and shown as caption."""

    name: str
    title: str
    description: str
    draw: Draw
    size: tuple[float, float] = (6.4, 3.6)

    def inline(self) -> str:
        """An <svg> element without fixed colours or fonts."""
        with _style(_INK, "none"):
            data = self._render("svg")
        svg = data.decode()
        svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
        # The page decides the font; ids must not clash with those of other figures on it.
        svg = re.sub(r"font: ([^;\"]*?px) [^;\"]+", r"font-size: \1", svg)
        svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(
            r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" focusable="false"', svg, count=1
        )
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        label = f"{self.title}. {self.description}".replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return svg.replace('focusable="false"', f'aria-label="{label}">', 1)

    def file(self, extension: str) -> bytes:
        """PNG or SVG with everything in it, dark on white, for slides."""
        with _style("#1c2330", "path"):
            return self._render(extension, title=self.title)

    def _render(self, extension: str, title: str | None = None) -> bytes:
        figure = Figure(figsize=self.size, layout="constrained")
        axes = figure.add_subplot()
        self.draw(axes)
        if title:
            axes.set_title(title)
        sink = io.BytesIO()
        figure.savefig(sink, format=extension, dpi=200, transparent=title is None)
        return sink.getvalue()


@contextmanager
def _style(ink: str, fonttype: str) -> Iterator[None]:
    names = ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"]
    settings: dict[str, object] = dict.fromkeys(names, ink)
    settings |= {
        "font.family": ["DejaVu Sans", *japanese_font()],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
        "axes.grid": True,
        "grid.color": "#8a93a3",
        "grid.alpha": 0.3,
        "svg.fonttype": fonttype,
        # Same data, same file.
        "svg.hashsalt": "clusterbatch",
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        yield


@lru_cache(maxsize=1)
def japanese_font() -> tuple[str, ...]:
    """The first installed font with Japanese glyphs, or nothing: then exported figures show boxes for them."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _JAPANESE_FONTS if name in installed)[:1]


def learning_curves(comparison: Comparison, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, arm in enumerate(comparison.arms):
            look = _look(number)
            mean = arm.curve.mean(1)
            axes.plot(comparison.steps, mean, label=arm.name, markersize=4, **look)
            if arm.curve.shape[1] > 1:
                low, high = arm.curve.min(1), arm.curve.max(1)
                axes.fill_between(comparison.steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(words["steps"])
        axes.set_ylabel(comparison.metric)
        _legend_above(axes)

    last = ", ".join(f"{arm.name} {arm.curve[-1].mean():.4f}" for arm in comparison.arms)
    text = words["learning_curves_text"].format(last=last)
    return Plot("learning-curves", words["learning_curves"], text, draw, _with_legend(comparison))


def gains(comparison: Comparison, min_gain: float, words: Mapping[str, str]) -> Plot:
    arms = comparison.others

    def draw(axes: Axes) -> None:
        for row, arm in enumerate(arms):
            assert arm.gain is not None
            look = _look(comparison.arms.index(arm))
            half = arm.gain.half_width(comparison.simultaneous) if arm.gain.seeds > 1 else 0.0
            axes.errorbar(arm.gain.mean, row, xerr=half, color=look["color"], marker=look["marker"], capsize=4)
        axes.axvline(0, color=_muted(), linewidth=1)
        axes.axvline(min_gain, color=_muted(), linewidth=1, linestyle=":")
        axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlabel(words["gain_axis"].format(metric=comparison.metric, reference=comparison.reference))

    figures = ", ".join(f"{arm.name} {arm.gain.mean:+.4f}" for arm in arms if arm.gain)
    text = words["gains_text"].format(figures=figures, min_gain=min_gain)
    return Plot("gains", words["gains"], text, draw, (6.4, 1.4 + 0.45 * len(arms)))


def gains_by_collection(comparison: Comparison, words: Mapping[str, str]) -> Plot:
    arms = comparison.others

    def draw(axes: Axes) -> None:
        for number, arm in enumerate(arms):
            look = _look(comparison.arms.index(arm))
            offset = (number - (len(arms) - 1) / 2) * 0.7 / max(1, len(arms))
            for row, collection in enumerate(comparison.collections):
                spread = arm.by_collection[collection]
                half = spread.half_width(comparison.confidence) if spread.seeds > 1 else 0.0
                axes.errorbar(
                    spread.mean,
                    row + offset,
                    xerr=half,
                    color=look["color"],
                    marker=look["marker"],
                    markersize=5,
                    capsize=3,
                    label=arm.name if row == 0 else None,
                )
        axes.axvline(0, color=_muted(), linewidth=1)
        axes.set_yticks(range(len(comparison.collections)), comparison.collections)
        axes.invert_yaxis()
        axes.set_xlabel(words["gain_axis"].format(metric=comparison.metric, reference=comparison.reference))
        axes.margins(y=0.08)
        _legend_above(axes)

    height = 1.6 + 0.28 * len(arms) * len(comparison.collections)
    return Plot("gains-by-collection", words["by_collection"], words["by_collection_text"], draw, (6.4, height))


def cost_against_gain(comparison: Comparison, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, arm in enumerate(comparison.arms):
            look = _look(number)
            gain = arm.gain.mean if arm.gain else 0.0
            hours = arm.cost.hours
            axes.plot([hours], [gain], color=look["color"], marker=look["marker"], linestyle="none", label=arm.name)
        axes.axhline(0, color=_muted(), linewidth=1)
        axes.set_xscale("log")
        _plain_numbers(axes)
        axes.set_xlabel(words["hours_axis"])
        axes.set_ylabel(words["gain_short"].format(metric=comparison.metric))
        _legend_above(axes)

    text = words["cost_against_gain_text"]
    return Plot("cost-against-gain", words["cost_against_gain"], text, draw, _with_legend(comparison))


def cluster_sizes(rows: Sequence[int], batch: int, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        sizes = np.asarray(rows)
        edges = np.geomspace(max(1, sizes.min()), sizes.max() + 1, 24)
        axes.hist(sizes, bins=edges.tolist(), color=_COLOURS[0])
        axes.axvline(batch, color=_muted(), linestyle=":")
        axes.set_xscale("log")
        _plain_numbers(axes)
        axes.set_xlabel(words["cluster_rows"])
        axes.set_ylabel(words["clusters"])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    text = words["cluster_sizes_text"].format(clusters=len(rows), median=int(np.median(rows)), batch=batch)
    return Plot("cluster-sizes", words["cluster_sizes"], text, draw)


def cluster_map(clusters: Sequence[MappedCluster], words: Mapping[str, str]) -> Plot:
    """Points carry the id `point-<number>`, in the order of `clusters`: the page hangs its hover texts on them."""
    sources = sorted({cluster.source for cluster in clusters})

    def draw(axes: Axes) -> None:
        largest = max(cluster.rows for cluster in clusters)
        for number, cluster in enumerate(clusters):
            look = _look(sources.index(cluster.source))
            axes.scatter(
                [cluster.x],
                [cluster.y],
                s=20 + 180 * cluster.rows / largest,
                color=look["color"],
                marker=look["marker"],
                alpha=0.7,
                gid=f"point-{number}",
            )
        axes.set_xticks([])
        axes.set_yticks([])

    text = words["cluster_map_text"].format(clusters=len(clusters), sources=len(sources))
    return Plot("cluster-map", words["cluster_map"], text, draw, (6.4, 4.8))


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        # After each round of colours the others are shifted by one: no two of 64 look alike.
        "marker": _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
        "linestyle": _LINES[(number + number // len(_COLOURS)) % len(_LINES)],
    }


def _legend_above(axes: Axes) -> None:
    """Outside the axes: with many arms it would cover their lines."""
    axes.legend(fontsize=9, ncols=_LEGEND_COLUMNS, loc="lower center", bbox_to_anchor=(0.5, 1))


def _with_legend(comparison: Comparison) -> tuple[float, float]:
    """Inches of a figure whose legend names all arms."""
    return 6.4, 3.4 + 0.2 * -(-len(comparison.arms) // _LEGEND_COLUMNS)


def _plain_numbers(axes: Axes) -> None:
    """Few ticks of a logarithmic axis, written out: powers of ten alone would often be one tick or none."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _muted() -> str:
    return "#8a93a3"
