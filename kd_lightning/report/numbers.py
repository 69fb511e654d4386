"""Figures as texts of the page."""

from __future__ import annotations

import math

from kd_lightning.runs.figures.statistics import Interval

_PERCENT = {"accuracy", "mean_iou", "agreement", "calibration_error", "balanced_accuracy", "f1"}
_PERCENT |= {"knn_accuracy", "probe_accuracy", "neighbor_agreement"}
MISSING = "\N{EN DASH}"
"""What stands in a table for a value that is not known."""
TITLES = {"accuracy": "accuracy", "mae": "mean absolute error", "loss": "loss", "knn_accuracy": "k-NN accuracy"}


def is_percent(figure: str) -> bool:
    """Whether a figure is shown in percent."""
    return figure in _PERCENT


def value_text(value: float, figure: str, digits: int = 1) -> str:
    """Return a figure with its unit.

    >>> value_text(0.9641, "accuracy")
    '96.4 %'
    """
    return f"{100 * value:.{digits}f} %" if is_percent(figure) else f"{value:.4g}"


def change_text(value: float, figure: str) -> str:
    """Return a difference with its sign; percentages in points.

    >>> change_text(0.0123, "accuracy")
    '+1.23'
    """
    text = format(100 * value, "+.2f") if is_percent(figure) else format(value, "+.4g")
    return text.replace("-", "\N{MINUS SIGN}")


def interval_text(interval: Interval, figure: str) -> str:
    """Return an interval of a difference."""
    return f"{change_text(interval[0], figure)} to {change_text(interval[1], figure)}"


def ratio_text(larger: float, smaller: float) -> str:
    r"""Return how many times one number is the other one, with three digits.

    >>> ratio_text(378.5, 25.5) == "14.8\N{MULTIPLICATION SIGN}"
    True
    """
    ratio = larger / smaller if smaller else math.inf
    return f"{ratio:.{0 if ratio >= 100 else 1 if ratio >= 10 else 2}f}\N{MULTIPLICATION SIGN}"


def count_text(count: int, noun: str) -> str:
    """Return a number with its noun, which takes an s but for 1.

    >>> count_text(1, "seed"), count_text(2000, "sample")
    ('1 seed', '2,000 samples')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def si_text(value: float) -> str:
    """Return a number with a prefix of thousands.

    >>> si_text(2379008), si_text(512)
    ('2.38 M', '512')
    """
    for scale, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"
