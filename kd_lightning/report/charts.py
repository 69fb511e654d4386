"""The drawings of the report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kd_lightning.report.svg import color, drawing_style, to_svg

_MARKERS = {"alone": "s", "method": "o", "teacher": "D"}
_NEXT = "^"  # of other roles


@dataclass(frozen=True)
class Series:
    """Values of one role.

    Attributes:
        kind: The role, which has a colour.
        label: Its name.
        values: A value for each seed.
    """

    kind: str
    label: str
    values: Sequence[float]


def marker_of(kind: str) -> str:
    """Return the marker of a role, so that roles differ not by colour alone."""
    return _MARKERS.get(kind, _NEXT)


def dot_plot(series: Sequence[Series], unit: str) -> Markup:
    """Draw a row for each role, with a dot for each seed and a line at the mean.

    Args:
        series: The roles.
        unit: Name and unit of the values, below the axis.
    """
    with drawing_style():
        figure = Figure(figsize=(4.8, 0.75 + 0.55 * len(series)), layout="constrained")
        axes = figure.subplots()
        for row, one in enumerate(series):
            mean = statistics.mean(one.values)
            axes.plot(
                [mean, mean], [row - 0.3, row + 0.3], color=color(one.kind), linewidth=2.6, solid_capstyle="round"
            )
            axes.plot(
                *zip(*_side_by_side(one.values, row), strict=True),
                marker_of(one.kind),
                color=color(one.kind),
                markersize=7,
                alpha=0.55,
                markeredgewidth=0,
            )
        axes.set_yticks(range(len(series)), [one.label for one in series])
        axes.set(ylim=(len(series) - 0.45, -0.55), xlabel=unit)
        axes.tick_params(axis="y", length=0, labelcolor=color("ink"), labelsize=10)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        means = "; ".join(f"{one.label}: mean {statistics.mean(one.values):.4g} of {len(one.values)}" for one in series)
        return to_svg(figure, "dots", f"Dot plot of {unit}, a dot for each seed. {means}.")


def _side_by_side(values: Sequence[float], row: float) -> list[tuple[float, float]]:
    """Return the places of dots; equal values lie above one another."""
    counts = Counter(round(value, 6) for value in values)
    seen: Counter[float] = Counter()
    places = []
    for value in values:
        key = round(value, 6)
        places.append((value, row + 0.2 * (seen[key] - (counts[key] - 1) / 2) / max(1, counts[key] / 3)))
        seen[key] += 1
    return places


def curves(by_role: Mapping[tuple[str, str], Sequence[Sequence[tuple[float, float]]]], name: str, unit: str) -> Markup:
    """Draw learning curves: thin lines for seeds, and a line for their mean.

    Args:
        by_role: For each kind and label of a role the curves of its seeds, as pairs of step and value.
        name: Name of the drawing on the page.
        unit: Name and unit of the values.
    """
    with drawing_style():
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        axes = figure.subplots()
        ends = []
        for (kind, label), seeds in by_role.items():
            for points in seeds:
                axes.plot(*zip(*points, strict=True), color=color(kind), linewidth=0.7, alpha=0.35)
            common = sorted(set.intersection(*({step for step, _ in points} for points in seeds)))
            values = [dict(points) for points in seeds]
            means = [statistics.mean(one[step] for one in values) for step in common]
            if common:
                axes.plot(common, means, color=color(kind), label=label)
                ends.append(f"{label} {means[0]:.3g} at first, {means[-1]:.3g} at the end")
        axes.set(xlabel="optimiser step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(fontsize=9, loc="best")
        return to_svg(figure, name, f"Learning curves of {unit}: {'; '.join(ends)}.")


def reliability(bins: Sequence[tuple[float, float, int]], kind: str, label: str, error: float, samples: int) -> Markup:
    """Draw the share of right decisions against the confidence.

    Args:
        bins: Mean confidence, share of right decisions and number of samples of each bin that is not empty.
        kind: The role.
        label: Its name.
        error: The expected calibration error, in [0, 1].
        samples: Number of samples.
    """
    with drawing_style():
        figure = Figure(figsize=(3.0, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=color("muted"), linewidth=0.9, linestyle=(0, (4, 3)))
        x, y = ([100 * one[column] for one in bins] for column in (0, 1))
        counts = [count for _, _, count in bins]
        axes.plot(x, y, color=color(kind), linewidth=0.9, alpha=0.5)
        sizes = [14 + 170 * (count / samples) for count in counts]
        axes.scatter(x, y, s=sizes, marker=marker_of(kind), color=color(kind), linewidths=0, clip_on=False, zorder=3)
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel="confidence, %", ylabel="right, %")
        axes.set(xticks=range(0, 101, 25), yticks=range(0, 101, 25))
        axes.set_title(label, fontsize=10, loc="left", color=color("ink"), pad=9)
        alt = f"Reliability diagram of {label}: {len(bins)} bins, expected calibration error {100 * error:.2f} %."
        return to_svg(figure, f"reliability-{kind}", alt)


def rounds(steps: Sequence[float], shares: Mapping[str, Sequence[float]]) -> Markup:
    """Draw shares of pseudo-labels over training.

    Args:
        steps: The optimiser steps.
        shares: {name: shares in [0, 1], NaN where there is none}; the first three are drawn.
    """
    with drawing_style():
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.subplots()
        every = max(1, len(steps) // 12)
        styles = zip(("method", "teacher", "alone"), ("-", "--", "-."), shares.items(), strict=False)
        for kind, style, (name, values) in styles:
            percent = [100 * value for value in values]
            marks: dict[str, Any] = {"marker": marker_of(kind), "markersize": 5, "markevery": every}
            axes.plot(steps, percent, style, color=color(kind), label=name, **marks)
        axes.set(xlabel="optimiser step", ylabel="%", ylim=(0, 103))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.legend(fontsize=9, loc="lower right")
        ends = "; ".join(f"{name}: {100 * values[-1]:.1f} % at the end" for name, values in shares.items())
        return to_svg(figure, "rounds", f"Pseudo-labels by optimiser step. {ends}.")
