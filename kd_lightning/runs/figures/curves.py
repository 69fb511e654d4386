"""Curves over training: a line for each seed, and their mean."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd_lightning.runs.figures.dots import INK, STYLE, color_of

_MOST_NAMES = 6  # in the legend


def plot_curves(values: Mapping[str, Sequence[Mapping[int, float]]], xlabel: str, ylabel: str) -> Figure:
    """Draw how a figure changes over training, of several methods over seeds: a thin line for each seed, a bold mean.

    Runs of the command line have ``compare``, which also draws each seed's last figure and computes intervals.

    Args:
        values: The curves of each method, by its name: for each seed the figure by step or epoch.
        xlabel: What is counted, such as epochs.
        ylabel: What the figure is, with its unit.

    Returns:
        The picture.

    >>> alone, distilled = [{0: 71.0, 1: 84.1}, {0: 69.5, 1: 85.0}], [{0: 88.2, 1: 95.1}]
    >>> plot_curves({"alone": alone, "distilled": distilled}, "epoch", "validation accuracy, %").axes[0].get_xlabel()
    'epoch'
    """
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(7, 3), dpi=100, layout="constrained")
        axes = picture.subplots()
        draw_curves(axes, [*values], [*values.values()])
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return picture


def draw_curves(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[Sequence[Mapping[int, float]]],
    corner: Literal["best", "upper right", "lower right"] = "best",
) -> None:
    """Draw the curves of each name, with a legend in a corner; see :func:`plot_curves`."""
    for number, (name, seeds) in enumerate(zip(names, values, strict=True)):
        by_step: dict[int, list[float]] = defaultdict(list)
        for curve in seeds:
            for step, value in curve.items():
                by_step[step].append(value)
            if len(seeds) > 1:
                axes.plot([*curve], [*curve.values()], color=color_of(number), linewidth=0.8, alpha=0.35, zorder=1)
        steps = sorted(by_step)
        means = [statistics.mean(by_step[step]) for step in steps]
        axes.plot(steps, means, color=color_of(number), linewidth=2, label=name, zorder=2)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(length=0)
    axes.grid()
    if 1 < len(names) <= _MOST_NAMES:
        for text in axes.legend(loc=corner, frameon=False, fontsize=9).get_texts():
            text.set_color(INK)
