"""The picture of a comparison: each seed's figure, what a student costs, learning curves, and the message as title."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kd_lightning.runs.figures.curves import draw_curves
from kd_lightning.runs.figures.dots import MUTED, NAME_WIDTH, STYLE, draw_dots
from kd_lightning.runs.figures.run_groups import Group
from kd_lightning.runs.figures.statistics import Difference, Interval

_NAMES = {"accuracy": "accuracy", "mae": "mean absolute error", "knn_accuracy": "k-NN accuracy"}
_PARTS = {"test": "test", "val": "validation"}


def draw_comparison(
    groups: Sequence[Group],
    differences: Sequence[Difference | None],
    figure: str,
    part: str,
    headline: str | None = None,
) -> Figure:
    """Draw groups of runs: left a dot for each seed and a line at their mean, right the learning curves.

    A row's name has what the student costs: MACs of one image, or KB of weights if the groups differ in precision.

    Args:
        groups: The groups of a comparison.
        differences: The difference of each group to its baseline.
        figure: ``accuracy``, drawn in percent, or ``mae``.
        part: ``test`` or ``val``.
        headline: The message about several methods. Default: None, which means that the second group is compared with
            the first.
    """
    scale, unit = (100, "accuracy, %") if figure == "accuracy" else (1, _NAMES.get(figure, figure))
    message, detail = describe(groups, differences, figure, part)
    if headline is not None:
        message, detail = headline, _all_differences(groups, differences, figure, part)
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(9.2, 1.9 + max(2.3, 0.62 * len(groups))), dpi=150, layout="constrained")
        dots, curves = picture.subplots(1, 2)
        _draw_dots(dots, groups, figure, scale)
        dots.set(
            xlabel=unit, title=f"{_PARTS.get(part, part)} {unit.partition(',')[0]} by seed (line: mean)".capitalize()
        )
        _draw_curves(curves, groups, figure, scale)
        curves.set(xlabel="optimiser step", ylabel=f"validation {unit}", title="Learning curves (bold: mean)")
        evidence = "\n".join(textwrap.wrap(detail, 130))
        inch = 1 / picture.get_figheight()
        picture.text(0.01, 1 + 0.05 * inch, evidence, va="bottom", fontsize=9.5, color=MUTED)
        top = 1 + (0.15 + 0.17 * (evidence.count("\n") + 1)) * inch
        picture.text(0.01, top, "\n".join(textwrap.wrap(message, 84)), va="bottom", fontsize=13, fontweight="bold")
    return picture


def describe(
    groups: Sequence[Group], differences: Sequence[Difference | None], figure: str, part: str
) -> tuple[str, str]:
    """Return the message of a comparison, the second group against the first, and a line with its evidence.

    The message is about the second group, the method of an ``experiment``; further groups have their rows.
    """
    title = _NAMES.get(figure, figure)
    means = [statistics.mean(values) if (values := group.values(figure)) else None for group in groups]
    samples = _measured(groups, part)
    found = differences[1] if len(groups) > 1 else None
    first, mean = groups[0], means[0]
    if found is None or found.mean is None or mean is None or means[1] is None:
        known = [(group.name, value) for group, value in zip(groups, means, strict=True) if value is not None]
        what = ", ".join(f"{name} {_value(value, figure)}" for name, value in known)
        reasons = f"; no verdict: {'; '.join(found.reasons)}" if found is not None and found.reasons else ""
        return f"{title.capitalize()}: {what or 'not measured'}", f"{samples}; {_seeds(len(first.results))}{reasons}"
    second = groups[1]
    base = "the same student alone" if first.name == f"{second.name}_alone" else first.name
    change = _value(abs(found.mean), figure, "points")
    verb = {"better": "gains", "worse": "loses"}.get(found.verdict or "", "")
    if figure == "mae" and verb:
        verb = {"better": "lowers", "worse": "raises"}[found.verdict or ""]
        message = f"{second.name} {verb} the {title} by {change} against {base}"
    elif verb:
        message = f"{second.name} {verb} {change} of {title} against {base}"
    else:
        message = f"{second.name} and {base}: no clear difference in {title}"
    ends = [
        f"over {over} {_interval(interval, figure)}"
        for interval, over in ((found.over_seeds, _seeds(found.seeds)), (found.over_samples, "samples"))
        if interval is not None
    ]
    change = _value(found.mean, figure, "points", "+") + (f" (95 % interval {', '.join(ends)})" if ends else "")
    evidence = [f"{_value(mean, figure)} → {_value(means[1], figure)}", change, samples]
    if found.verdict is None:
        evidence.append(f"no verdict: {'; '.join(found.reasons)}")
    return message, "; ".join(evidence) + "."


def _all_differences(groups: Sequence[Group], differences: Sequence[Difference | None], figure: str, part: str) -> str:
    """Return the evidence of several methods: the difference of each to its baseline, and on what it was measured."""
    changes = [
        f"{group.name} {_value(found.mean, figure, 'points', '+')}"
        for group, found in zip(groups, differences, strict=True)
        if found is not None and found.mean is not None
    ]
    known = f"over the student alone: {', '.join(changes)}; " if changes else ""
    return f"{known}{_measured(groups, part)}."


def _measured(groups: Sequence[Group], part: str) -> str:
    sizes = sorted({size for group in groups for size in group.samples})
    count = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1]))) if sizes else "no"
    return f"n = {count} {_PARTS.get(part, part)} samples"


def _draw_dots(axes: Axes, groups: Sequence[Group], figure: str, scale: float) -> None:
    names = [
        "\n".join([*textwrap.wrap(group.name, NAME_WIDTH), *([cost] if cost else [])])
        for group, cost in zip(groups, _costs(groups), strict=True)
    ]
    values = [[scale * value for value in group.values(figure)] for group in groups]
    draw_dots(axes, names, values, "{:.1f} %" if figure == "accuracy" else "{:.4g}")


def _draw_curves(axes: Axes, groups: Sequence[Group], figure: str, scale: float) -> None:
    key = f"val/{figure}"
    curves = [
        [{int(row["step"]): scale * row[key] for row in run.validations() if key in row} for run in group.runs.values()]
        for group in groups
    ]
    names = [group.name for group in groups]
    draw_curves(axes, names, curves, corner="upper right" if figure == "mae" else "lower right")


def _costs(groups: Sequence[Group]) -> list[str]:
    """Return what each group's student costs, with its ratio to the most expensive one."""
    by_size = len({group.costs["precision"] for group in groups if group.costs}) > 1
    key = "size_kb" if by_size else "macs"
    known = [group.costs[key] for group in groups if key in group.costs]
    texts = []
    for group in groups:
        if not (cost := group.costs.get(key)):
            texts.append("")
            continue
        text = f"{cost:,.1f} KB, {group.costs['precision']}" if by_size else f"{EngFormatter(places=1)(cost)} MACs"
        ratio = max(known) / cost
        less = f", {ratio:.1f}× {'smaller' if by_size else 'fewer'}" if ratio >= 1.05 else ""  # noqa: RUF001
        texts.append(text + less)
    return texts


def _value(value: float, figure: str, unit: str = "%", sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} {unit}" if figure == "accuracy" else f"{value:{sign}.4g}"


def _interval(interval: Interval, figure: str) -> str:
    low, high = (format(100 * end, "+.1f") if figure == "accuracy" else format(end, "+.4g") for end in interval)
    return f"{low} … {high}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"
