"""Figures of a comparison, by matplotlib: inline SVG that takes the page's colours and fonts, and PNG and SVG files.

Every arm has a colour (Okabe and Ito's, told apart by most colour-blind readers, on light and dark), a marker and a
line style, so that none of them alone carries the meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from clusterbatch.experiments.compare.results import Comparison
from clusterbatch.reporting.figures import (
    LEGEND_COLUMNS,
    Plot,
    axis_name,
    legend_above,
    legend_name,
    look_of,
    muted,
    plain_numbers,
)


def learning_curves(comparison: Comparison, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, arm in enumerate(comparison.arms):
            look = look_of(number)
            mean = arm.curve.mean(1)
            axes.plot(comparison.steps, mean, label=legend_name(arm.name), markersize=4, **look)
            if arm.curve.shape[1] > 1:
                low, high = arm.curve.min(1), arm.curve.max(1)
                axes.fill_between(comparison.steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(words["steps"])
        axes.set_ylabel(comparison.metric)
        legend_above(axes)

    last = ", ".join(f"{arm.name} {arm.curve[-1].mean():.4f}" for arm in comparison.arms)
    text = words["learning_curves_text"].format(last=last)
    return Plot("learning-curves", words["learning_curves"], text, draw, _with_legend(comparison))


def difference_curves(comparison: Comparison, min_gain: float, words: Mapping[str, str]) -> Plot:
    """Draw what the learning curves hide, for all of them start from the same untrained model."""
    baseline = comparison.baseline.curve

    def draw(axes: Axes) -> None:
        for arm in comparison.others:
            look, ahead = look_of(comparison.arms.index(arm)), arm.curve - baseline
            axes.plot(comparison.steps, ahead.mean(1), label=legend_name(arm.name), markersize=4, **look)
            if ahead.shape[1] > 1:
                low, high = ahead.min(1), ahead.max(1)
                axes.fill_between(comparison.steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.axhline(0, color=muted(), linewidth=1)
        axes.axhline(min_gain, color=muted(), linewidth=1, linestyle=":")
        axes.set_xlabel(words["steps"])
        axes.set_ylabel(words["gain_short"].format(metric=comparison.metric))
        legend_above(axes)

    last = ", ".join(f"{arm.name} {(arm.curve - baseline)[-1].mean():+.4f}" for arm in comparison.others)
    text = words["difference_curves_text"].format(
        metric=comparison.metric, reference=comparison.reference, min_gain=min_gain, last=last
    )
    return Plot("difference-curves", words["difference_curves"], text, draw, _with_legend(comparison))


def gains(comparison: Comparison, min_gain: float, words: Mapping[str, str]) -> Plot:
    arms = comparison.others

    def draw(axes: Axes) -> None:
        for row, arm in enumerate(arms):
            assert arm.gain is not None
            look = look_of(comparison.arms.index(arm))
            half = arm.gain.half_width(comparison.simultaneous) if arm.gain.is_known else 0.0
            axes.errorbar(arm.gain.mean, row, xerr=half, color=look["color"], marker=look["marker"], capsize=4)
        axes.axvline(0, color=muted(), linewidth=1)
        axes.axvline(min_gain, color=muted(), linewidth=1, linestyle=":")
        axes.set_yticks(range(len(arms)), [axis_name(arm.name) for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlabel(words["gain_axis"].format(metric=comparison.metric, reference=comparison.reference))

    figures = ", ".join(f"{arm.name} {arm.gain.mean:+.4f}" for arm in arms if arm.gain)
    text = words["gains_text"].format(figures=figures, min_gain=min_gain)
    return Plot("gains", words["gains"], text, draw, (6.4, 1.4 + 0.45 * len(arms)))


def gains_by_collection(comparison: Comparison, words: Mapping[str, str]) -> Plot:
    arms, level = comparison.others, comparison.joint(len(comparison.collections))

    def draw(axes: Axes) -> None:
        for number, arm in enumerate(arms):
            look = look_of(comparison.arms.index(arm))
            offset = (number - (len(arms) - 1) / 2) * 0.7 / max(1, len(arms))
            for row, collection in enumerate(comparison.collections):
                spread = arm.by_collection[collection]
                half = spread.half_width(level) if spread.is_known else 0.0
                axes.errorbar(
                    spread.mean,
                    row + offset,
                    xerr=half,
                    color=look["color"],
                    marker=look["marker"],
                    markersize=5,
                    capsize=3,
                    label=legend_name(arm.name) if row == 0 else None,
                )
        axes.axvline(0, color=muted(), linewidth=1)
        axes.set_yticks(range(len(comparison.collections)), list(map(axis_name, comparison.collections)))
        axes.invert_yaxis()
        axes.set_xlabel(words["gain_axis"].format(metric=comparison.metric, reference=comparison.reference))
        axes.margins(y=0.08)
        legend_above(axes)

    height = 1.6 + 0.28 * len(arms) * len(comparison.collections)
    return Plot("gains-by-collection", words["by_collection"], words["by_collection_text"], draw, (6.4, height))


def cost_against_gain(comparison: Comparison, words: Mapping[str, str]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, arm in enumerate(comparison.arms):
            look = look_of(number)
            gain = arm.gain.mean if arm.gain else 0.0
            hours = arm.cost.hours
            axes.plot(
                [hours],
                [gain],
                color=look["color"],
                marker=look["marker"],
                linestyle="none",
                label=legend_name(arm.name),
            )
        axes.axhline(0, color=muted(), linewidth=1)
        axes.set_xscale("log")
        plain_numbers(axes)
        axes.set_xlabel(words["hours_axis"])
        axes.set_ylabel(words["gain_short"].format(metric=comparison.metric))
        legend_above(axes)

    text = words["cost_against_gain_text"]
    return Plot("cost-against-gain", words["cost_against_gain"], text, draw, _with_legend(comparison))


def gain_by_batch(cells: Sequence[Mapping[str, Any]], metric: str, baseline: str, words: Mapping[str, str]) -> Plot:
    """Draw the gain of every arm over the baseline of the same size; cells: those of grid.write_grid."""
    sizes = sorted({cell["batch"] for cell in cells})
    arms = list(dict.fromkeys(cell["arm"] for cell in cells if cell["gain"] is not None))

    def draw(axes: Axes) -> None:
        for number, arm in enumerate(arms):
            look, own = look_of(number), [cell for cell in cells if cell["arm"] == arm]
            places = [cell["batch"] for cell in own]
            axes.plot(places, [cell["gain"] for cell in own], label=legend_name(arm), markersize=5, **look)
            known = [cell for cell in own if cell["low"] is not None]
            at, low, high = ([cell[end] for cell in known] for end in ("batch", "low", "high"))
            if len(known) > 1:
                axes.fill_between(at, low, high, color=look["color"], alpha=0.12, linewidth=0)
            else:
                axes.vlines(at, low, high, color=look["color"], alpha=0.5)
        axes.axhline(0, color=muted(), linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel(words["batch_size"])
        axes.set_ylabel(words["gain_axis"].format(metric=metric, reference=baseline))
        legend_above(axes)

    text = words["gain_by_batch_text"].format(baseline=baseline)
    return Plot("gain-by-batch", words["gain_by_batch"], text, draw, (6.4, 3.8 + 0.2 * -(-len(arms) // LEGEND_COLUMNS)))


def gain_map(cells: Sequence[Mapping[str, Any]], metric: str, baseline: str, words: Mapping[str, str]) -> Plot:
    """Draw the gain of clustered batches by batch size and cluster size; cells: those of grid.write_grid."""
    own = {(cell["cluster_batches"], cell["batch"]): cell for cell in cells if cell["cluster_batches"] is not None}
    clusters, sizes = (sorted({key[side] for key in own}) for side in (0, 1))
    values = np.array(
        [[own[row, size]["gain"] if (row, size) in own else np.nan for size in sizes] for row in clusters]
    )
    most = max(1e-4, float(np.nanmax(np.abs(values))))

    def draw(axes: Axes) -> None:
        axes.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto", origin="lower")
        axes.grid(visible=False)
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                cell = own[clusters[row], sizes[column]]
                # Beyond noise: the interval is on one side of zero.
                weight = "bold" if cell["low"] is not None and cell["low"] * cell["high"] > 0 else "normal"
                dark = abs(value) > 0.7 * most
                colour = "#ffffff" if dark else "#1c2330"
                axes.text(column, row, f"{value:+.3f}", ha="center", va="center", color=colour, weight=weight)
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set_yticks(range(len(clusters)), [f"{size:g}" for size in clusters])
        axes.set_xlabel(words["batch_size"])
        axes.set_ylabel(words["cluster_batches"])

    text = words["gain_map_text"].format(metric=metric, baseline=baseline)
    return Plot("gain-map", words["gain_map"], text, draw, (6.4, 1.6 + 0.45 * len(clusters)))


def _with_legend(comparison: Comparison) -> tuple[float, float]:
    """Inches of a figure whose legend names all arms."""
    return 6.4, 3.4 + 0.2 * -(-len(comparison.arms) // LEGEND_COLUMNS)
