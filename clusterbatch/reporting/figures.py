"""Figures by matplotlib: inline SVG that takes the page's colours and fonts, and PNG and SVG files.

Every series has a colour (Okabe and Ito's, told apart by most colour-blind readers, on light and dark), a marker and a
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
from unicodedata import east_asian_width

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from clusterbatch.reporting.cluster_views import MappedCluster

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C", "#B8A600"]
_MARKERS = "osD^vPX*"
_LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2))]
LEGEND_COLUMNS = 3
# Placeholder of the page's text colour; replaced by currentColor, which follows light and dark.
_INK = "#123456"
# Characters of a name beside an axis, and in a legend, whose columns share the width of the figure.
_LONGEST, _LONGEST_IN_LEGEND = 28, 20
# Sources that the legend of a map names; the page has the others in its texts.
_MOST_NAMED = 12
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

# Inches that a title adds to the height of a figure.
_TITLE = 0.35

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
        width, height = self.size
        figure = Figure(figsize=(width, height + (_TITLE if title else 0)), layout="constrained")
        self.draw(figure.add_subplot())
        if title:
            # Of the figure, not of the axes: a legend above those would be where their title is.
            figure.suptitle(title)
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
        # Names are the user's: dollars in them are no formulas.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        yield


@lru_cache(maxsize=1)
def japanese_font() -> tuple[str, ...]:
    """The first installed font with Japanese glyphs, if any; without one, exported figures show boxes for them."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _JAPANESE_FONTS if name in installed)[:1]


def cluster_sizes(rows: Sequence[int], batch: int, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        sizes = np.asarray(rows)
        edges = np.geomspace(max(1, sizes.min()), sizes.max() + 1, 24)
        axes.hist(sizes, bins=edges.tolist(), color=COLOURS[0])
        axes.axvline(batch, color=muted(), linestyle=":")
        axes.set_xscale("log")
        plain_numbers(axes)
        axes.set_xlabel(words["cluster_rows"])
        axes.set_ylabel(words["clusters"])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    text = words["cluster_sizes_text"].format(clusters=len(rows), median=int(np.median(rows)), batch=batch)
    return Plot("cluster-sizes", words["cluster_sizes"], text, draw)


def cluster_map(clusters: Sequence[MappedCluster], words: Mapping[str, str]) -> Plot:
    """Plot clusters on two axes; ids `point-<number>`, in the order of `clusters`, serve the page's hover texts."""
    sources = sorted({cluster.source for cluster in clusters})

    def draw(axes: Axes) -> None:
        largest = max(cluster.rows for cluster in clusters)
        for number, cluster in enumerate(clusters):
            look = look_of(sources.index(cluster.source))
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
        for number, source in enumerate(sources[:_MOST_NAMED]):
            look = look_of(number)
            axes.scatter([], [], color=look["color"], marker=look["marker"], label=legend_name(source))
        legend_above(axes)

    text = words["cluster_map_text"].format(clusters=len(clusters), sources=len(sources))
    return Plot("cluster-map", words["cluster_map"], text, draw, (6.4, 4.8))


def look_of(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        # After each round of colours the others are shifted by one: no two of 64 look alike.
        "marker": _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)],
        "linestyle": _LINES[(number + number // len(COLOURS)) % len(_LINES)],
    }


def axis_name(name: str, longest: int = _LONGEST) -> str:
    """Return a name of the user's as it can stand beside an axis: cut in its middle if it would take the figure."""
    kept = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - kept]}…{name[-kept:]}"


def legend_name(name: str) -> str:
    """Return a name as it can stand in a legend: a shorter one, and never with an underscore first.

    Matplotlib leaves such names out; a space without width before them keeps them in.
    """
    short = axis_name(name, _LONGEST_IN_LEGEND)
    return f"\u200b{short}" if short.startswith("_") else short


def legend_above(axes: Axes) -> None:
    """Put the legend outside the axes: with many arms it would cover their lines."""
    labels = axes.get_legend_handles_labels()[1]
    # Chinese and Japanese characters are twice as wide.
    wide = any(
        len(label) + sum(east_asian_width(each) in "WF" for each in label) > _LONGEST_IN_LEGEND + 1 for label in labels
    )
    columns = LEGEND_COLUMNS - 1 if wide else LEGEND_COLUMNS
    axes.legend(fontsize=9, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1))


def plain_numbers(axes: Axes) -> None:
    """Label a few ticks of a logarithmic axis in plain numbers: powers of ten alone would often be one tick or none."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: np.format_float_positional(value, 6, trim="-", fractional=False))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())


def muted() -> str:
    return "#8a93a3"
