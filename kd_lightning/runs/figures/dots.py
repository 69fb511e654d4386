"""A dot for the figure of each seed, in a row for each method."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLORS = ("#6b7280", "#0b6bcb", "#2f855a", "#b7471d", "#7c3aed", "#b58900", "#0e7490", "#be185d")
INK, MUTED, _RULE = "#1f2933", "#5b6673", "#dfe3e8"
STYLE: Any = {
    "text.parse_math": False,  # names may have a $
    "text.color": INK,
    "font.size": 10,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": _RULE,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
NAME_WIDTH = 24
"""Letters of a row's name in a line."""


def plot_seeds(values: Mapping[str, Sequence[float]], xlabel: str, text: str = "{:.1f}") -> Figure:
    """Draw figures of several methods over seeds: a row for each method, a dot for each seed, a line at the mean.

    Runs of the command line have ``compare``, which also draws learning curves and computes intervals.

    Args:
        values: The figures of each method, by name. A method without figures is a row that says so.
        xlabel: What the figures are, with their unit.
        text: How means are written, as for ``str.format``.

    Returns:
        The picture.

    >>> plot_seeds({"alone": [84.1, 85.0], "distilled": [95.1, 94.9]}, "test accuracy, %").axes[0].get_xlabel()
    'test accuracy, % (line: mean)'
    """
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(7, 0.9 + 0.62 * len(values)), dpi=100, layout="constrained")
        axes = picture.subplots()
        names = ["\n".join(textwrap.wrap(name, NAME_WIDTH)) for name in values]
        draw_dots(axes, names, [[*own] for own in values.values()], text)
        axes.set_xlabel(f"{xlabel} (line: mean)")
    return picture


def draw_dots(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], text: str) -> None:
    """Draw a row of dots for each name; see :func:`plot_seeds`."""
    for row, own in enumerate(values):
        color = color_of(row)
        if not own:
            axes.text(0.02, row, "not measured", color=MUTED, va="center", transform=axes.get_yaxis_transform())
            continue
        mean, middle = statistics.mean(own), (len(own) - 1) / 2
        if len(own) > 1:
            axes.plot([mean, mean], [row - 0.27, row + 0.27], color=color, linewidth=2.5, solid_capstyle="round")
        places = [row + 0.3 * (number - middle) / len(own) for number in range(len(own))]  # equal values, too, show
        axes.plot(own, places, "o", color=color, markersize=7, alpha=0.6, markeredgewidth=0)
        place: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
        axes.annotate(text.format(mean), (mean, row - 0.27), color=color, fontweight="bold", **place)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set(ylim=(max(len(names), 2) - 0.5, -0.72))
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x")


def color_of(number: int) -> str:
    """Return the colour of a row."""
    return _COLORS[number % len(_COLORS)]
