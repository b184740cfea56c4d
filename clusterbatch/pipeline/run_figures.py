"""Figures of one workspace: how training went, what changed by source, and the rounds of refresh."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clusterbatch.reporting.figures import COLOURS, Plot, axis_name, look_of, muted
from clusterbatch.store import Artifact, Manifest

# Figures of a step that are drawn, in this order.
TRAINING = ("loss", "accuracy", "gradient_norm")
_MOST_SEGMENTS = 20
# Points of a smoothed curve: each is the mean of the steps around it.
_SMOOTHED = 60


def training_lines(artifact: Artifact, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the metrics of every step of a finished training, in step order."""
    lines: list[dict[str, Any]] = []
    for part in manifest.parts:
        if part.path.endswith(".jsonl"):
            lines += [json.loads(line) for line in artifact.read_part(part).splitlines() if line]
    return lines


def training_curves(lines: Sequence[Mapping[str, Any]], words: Mapping[str, str]) -> list[Plot]:
    """Return one plot per figure of `TRAINING`: every step as a pale line, and its running mean."""
    steps = np.array([line["step"] for line in lines])
    return [_curve(name, steps, np.array([line[name] for line in lines], float), words) for name in TRAINING]


def _curve(name: str, steps: np.ndarray, values: np.ndarray, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        smooth = running_mean(values, -(-len(values) // _SMOOTHED))
        axes.plot(steps, smooth, color=COLOURS[0], linewidth=1.8)
        axes.set_xlabel(words["step"])
        axes.set_ylabel(words[f"training_{name}"])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        # Spikes at the start would flatten everything after them.
        low, high = np.nanpercentile(values, [0.5, 99.5])
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)

    first, last = (values[part].mean() for part in (slice(None, _tenth(values)), slice(-_tenth(values), None)))
    text = words["training_text"].format(name=words[f"training_{name}"], first=first, last=last)
    return Plot(f"training-{name.replace('_', '-')}", words[f"training_{name}"], text, draw, (4.6, 3.0))


def _tenth(values: np.ndarray) -> int:
    return max(1, len(values) // 10)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return (n,) means of `values` (n,) over a centred window of about `width`, narrower at both ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    means: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return means


def segments_before_after(rows: Sequence[Mapping[str, Any]], metric: str, words: Mapping[str, str]) -> Plot:
    """Return a plot with one line per segment: the value before and after, and the interval of the difference.

    rows: {segment, queries, before, after, low, high}. The segments with the most queries are drawn.
    """
    shown = sorted(rows, key=lambda row: -row["queries"])[:_MOST_SEGMENTS]
    shown.sort(key=lambda row: row["after"])

    def draw(axes: Axes) -> None:
        heights = range(len(shown))
        before, after = ([row[key] for row in shown] for key in ("before", "after"))
        axes.hlines(heights, before, after, color=muted(), linewidth=1.2, zorder=1)
        low, high = ([row["before"] + row[key] for row in shown] for key in ("low", "high"))
        axes.hlines(heights, low, high, color=COLOURS[0], linewidth=5, alpha=0.35, zorder=2)
        axes.scatter(
            before, heights, s=36, facecolors="none", edgecolors=COLOURS[1], zorder=3, label=words["before_training"]
        )
        axes.scatter(after, heights, s=36, marker="s", zorder=3, label=words["after_training"], color=COLOURS[0])
        axes.set_yticks(heights, [f"{axis_name(row['segment'])} ({row['queries']:,})" for row in shown])
        axes.set_xlabel(metric)
        axes.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    text = words["segments_figure_text"].format(metric=metric, shown=len(shown))
    size = (6.4, 1.2 + 0.28 * len(shown))
    return Plot("before-after", words["segments_figure"].format(metric=metric), text, draw, size)


def refresh_rounds(rounds: Sequence[Mapping[str, Any]], live: int | None, words: Mapping[str, str]) -> Plot:
    """Return the metric by generation: the live model's before each round and the round's own."""
    done = [row for row in rounds if row["own_value"] is not None]

    def draw(axes: Axes) -> None:
        generations = [row["generation"] for row in done]
        for number, (key, word) in enumerate((("live_value", "live_before"), ("own_value", "own_value"))):
            axes.plot(generations, [row[key] for row in done], label=words[word], **look_of(number))
        if live is not None:
            axes.axvline(live, color=muted(), linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        # One round alone would have an axis of fractions.
        shown = [*generations, *([] if live is None else [live])]
        axes.set_xlim(min(shown) - 0.5, max(shown) + 0.5)
        axes.set_xlabel(words["generation"])
        axes.set_ylabel(done[0]["metric"])
        axes.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    return Plot("rounds", words["generations"], words["rounds_text"].format(live=live), draw)
