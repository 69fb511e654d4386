"""The picture of a confusion matrix: row percent, the number of samples of each class, the worst confusions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

MOST_CELLS = 20
"""Number of classes up to which each cell has its number; beyond, the worst confusions are listed."""
_NAME_WIDTH = 22
_STYLE: Any = {"text.parse_math": False, "font.size": 9}  # names may have a $


def draw_confusion_matrix(counts: npt.ArrayLike, names: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix in row percent: which share of the samples of a class got each prediction.

    Args:
        counts: Numbers of samples (C, C), by true and predicted class; of the multilabel task (L, 2, 2), by label.
        names: Names of the classes or labels. Default: None, which means their numbers; so does another count of names.
    """
    matrix = np.asarray(counts, dtype=np.int64)
    own = names is not None and len(names) == len(matrix)
    known = [_short(str(name)) for name in names] if own and names is not None else [*map(str, range(len(matrix)))]
    with mpl.rc_context(_STYLE):
        if matrix.ndim == 3:
            return _draw_labels(matrix, known)
        return _draw_all(matrix, known) if len(matrix) <= MOST_CELLS else _draw_worst(matrix, known)


def row_percent(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return each row in percent of its sum; NaN for a row without samples.

    >>> row_percent(np.array([[3, 1], [0, 0]])).tolist()
    [[75.0, 25.0], [nan, nan]]
    """
    sums = counts.sum(axis=-1, keepdims=True)
    return np.where(sums > 0, 100 * counts / np.maximum(sums, 1), np.nan)


def worst_confusions(counts: npt.NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """Return the pairs (true, predicted) of different classes with the most samples, then with the largest share."""
    rows, columns = np.nonzero(counts * (1 - np.eye(len(counts), dtype=np.int64)))
    numbers, shares = counts[rows, columns], row_percent(counts)[rows, columns]
    order = np.lexsort((columns, rows, -shares, -numbers))[:most]
    return [(int(rows[place]), int(columns[place])) for place in order]


def _draw_all(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Figure:
    count = len(counts)
    side = 2.2 + 0.5 * count
    figure = Figure(figsize=(max(side + 0.6, 4.6), side), layout="constrained")
    axes = figure.subplots()
    ends = [f"{name}  (n = {n:,})" for name, n in zip(names, counts.sum(axis=1), strict=True)]
    _draw_cells(axes, row_percent(counts), ends, names)
    axes.set(xlabel="predicted class", ylabel="true class")
    _set_title(figure, counts)
    return figure


def _draw_cells(axes: Axes, percent: npt.NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_facecolor("#eceff2")  # of rows without samples
    axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="auto")  # so that rare confusions show
    for (row, column), value in np.ndenumerate(percent):
        if value > 0:
            color = "white" if value > 36 else "#1f2933"
            axes.text(column, row, _percent(value), ha="center", va="center", color=color, fontsize=8.5)
    axes.set_yticks(range(len(rows)), rows)
    long = max(map(len, columns)) > 3
    axes.set_xticks(range(len(columns)), columns, rotation=45 if long else 0, ha="right" if long else "center")
    axes.tick_params(length=0)
    for number in range(1, len(rows)):
        axes.axhline(number - 0.5, color="white", linewidth=1)
    axes.spines[:].set_visible(False)


def _draw_worst(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw the whole matrix as an image, and beside it the worst confusions by name."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    image, bars = figure.subplots(1, 2, width_ratios=(1, 1.1))
    percent = row_percent(counts)
    image.set_facecolor("#eceff2")
    shown = image.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    figure.colorbar(shown, ax=image, label="% of the true class", ticks=[0, 1, 10, 50, 100], shrink=0.75)
    image.set(xlabel="predicted class (number)", ylabel="true class (number)")
    worst = worst_confusions(counts, MOST_CELLS)
    values = [percent[pair] for pair in worst]
    bars.barh(range(len(worst)), values, color="#b7471d", height=0.65)
    bars.set_yticks(range(len(worst)), [f"{names[true]} → {names[predicted]}" for true, predicted in worst])
    for place, pair in enumerate(worst):
        text = f" {_percent(percent[pair])} % ({counts[pair]:,} of {counts[pair[0]].sum():,})"
        bars.text(percent[pair], place, text, va="center", fontsize=8)
    bars.set(xlim=(0, 1.45 * max(values, default=1.0)), ylim=(max(len(worst), 1) - 0.4, -0.6), xticks=[])
    bars.set_title("most frequent confusions: true → predicted" if worst else "no confusions", fontsize=10)
    bars.tick_params(length=0)
    bars.spines[:].set_visible(False)
    _set_title(figure, counts)
    return figure


def _draw_labels(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw a row for each label; of many labels those with the smallest share of found positives."""
    percent = row_percent(counts).reshape(len(counts), 4)
    order = [*range(len(counts))]
    if len(counts) > MOST_CELLS:
        order = sorted(order, key=lambda n: (math.isnan(percent[n, 3]), percent[n, 3], n))[:MOST_CELLS]
    rows = [f"{names[n]}  (n = {counts[n, 1].sum():,})" for n in order]
    figure = Figure(figsize=(7, 1.7 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    columns = ["true negative", "false positive", "false negative", "true positive"]
    _draw_cells(axes, percent[order], rows, columns)
    axes.axvline(1.5, color="white", linewidth=4)
    few = f"; the {len(rows)} of {len(counts)} labels with the lowest recall" if len(rows) < len(counts) else ""
    size = counts[0].sum() if len(counts) else 0
    figure.suptitle(f"% of the negatives, and of the n positives, of {size:,} samples{few}", fontsize=10)
    return figure


def _set_title(figure: Figure, counts: npt.NDArray[np.int64]) -> None:
    size = int(counts.sum())
    right = f": {100 * np.trace(counts) / size:.1f} % right" if size else ""
    figure.suptitle(f"{size:,} samples{right}; cells: % of the true class", fontsize=10)


def _percent(value: float) -> str:
    """Format a percentage in three letters; only 0 and 100 are written as such.

    >>> [_percent(value) for value in (0.02, 4.26, 99.7, 100.0)]
    ['<.1', '4.3', '>99', '100']
    """
    if value < 0.1:
        return "<.1"
    if value < 9.95:
        return f"{value:.1f}"
    return ">99" if 99.5 <= value < 100 else f"{value:.0f}"


def _short(name: str) -> str:
    """Cut the middle of a long name: names of many classes often begin alike."""
    half = (_NAME_WIDTH - 1) // 2
    return name if len(name) <= _NAME_WIDTH else f"{name[:half]}…{name[-half:]}"
