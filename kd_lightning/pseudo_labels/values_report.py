"""Metrics and figures of a round of pseudo-labels that are values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.pseudo_labels.table import PseudoValues


def value_metrics(table: PseudoValues, given: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Metrics of a round of values.

    Args:
        table: The round.
        given: Labels of the labeled samples, (M,) or (M, D), NaN where one is missing.
        truth: True value of each row, (N,), NaN where unknown. If None, all are unknown.

    Returns:
        By name: ``accepted`` (number), ``coverage`` (accepted share), ``spread`` (median) and ``accepted_spread`` (of
        the accepted ones; absent if there are none), ``change`` (root of the mean squared change since the last round),
        in standard deviations of the given labels; ``std_ratio`` (standard deviation of the accepted values, divided by
        that of the given ones, mean over the outputs; far below 1 if only values near the mean are accepted; absent if
        an output has fewer than two); and of values whose truth is known ``mae``, ``rmse`` and ``r2``, and of the
        accepted ones among these ``accepted_mae``, ``accepted_rmse`` and ``accepted_r2`` (absent if there are none).
        Errors are in the unit of the labels. R² is the mean over the outputs, absent if an output has fewer than two
        different true values.
    """
    accepted = table.accepted
    values = {
        "accepted": float(accepted.sum()),
        "coverage": float(table.weight.double().mean()),
        "spread": float(table.spread.double().median()),
        "change": float(table.change.double().square().mean().sqrt()),
    }
    if accepted.any():
        values["accepted_spread"] = float(table.spread[accepted].double().median())
    given = given.double().reshape(len(given), -1)
    outputs = _outputs(table)
    taken = [table.label[accepted & (outputs == number)].double() for number in range(given.shape[1])]
    if min(map(len, taken)) > 1:
        known = (column[~column.isnan()] for column in given.T)
        ratios = [one.std() / two.std() for one, two in zip(taken, known, strict=True)]
        values["std_ratio"] = float(torch.stack(ratios).mean())
    known_rows = torch.zeros_like(accepted) if truth is None else ~truth.isnan()
    for prefix, rows in (("", known_rows), ("accepted_", known_rows & accepted)):
        if truth is not None and rows.any():
            found = _errors(table.label[rows].double(), truth[rows].double(), outputs[rows])
            values |= {f"{prefix}{name}": value for name, value in found.items()}
    return values


def _outputs(table: PseudoValues) -> Tensor:
    """Return the number of the output of each row, (N,)."""
    return torch.zeros_like(table.index) if table.output is None else table.output


def _errors(found: Tensor, truth: Tensor, outputs: Tensor) -> dict[str, float]:
    errors = found - truth
    values = {"mae": float(errors.abs().mean()), "rmse": float(errors.square().mean().sqrt())}
    scores = []
    for number in sorted({*outputs.tolist()}):
        rows = outputs == number
        total = (truth[rows] - truth[rows].mean()).square().sum()
        if not total > 0:
            return values
        scores.append(1 - errors[rows].square().sum() / total)
    return values | {"r2": float(torch.stack(scores).mean())}


def true_values(table: PseudoValues, truth_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the true value of each row, (N,), NaN where it is unknown.

    Args:
        table: The round.
        truth_of: Returns the true values of samples (M,), by index: (M,) or (M, D), NaN where unknown.
    """
    samples, row = torch.unique(table.index, return_inverse=True)
    truth = truth_of(samples).double()
    return truth[row] if table.output is None else truth[row, table.output]


def spread_figure(table: PseudoValues, limit: float | None) -> Figure:
    """Draw a histogram of a round's spreads, with a line at the limit if there is one."""
    histogram = Figure(figsize=(5, 3), layout="constrained")
    panel = histogram.subplots()
    panel.hist(table.spread.numpy(), bins=40)
    if limit is not None and limit < float("inf"):
        panel.axvline(limit, color="C3", label=f"limit {limit:g}")
        panel.legend()
    panel.set(xlabel="spread over views, standard deviations of the given labels")
    panel.set(ylabel="samples" if table.output is None else "values")
    panel.set_title(f"round {table.round}: {int(table.accepted.sum())} of {len(table.label)} accepted", fontsize=9)
    return histogram


def value_figure(table: PseudoValues, given: Tensor) -> Figure:
    """Draw the distributions of a round's accepted values and of the given labels, (M,) or (M, D); up to 6 outputs."""
    given = given.double().reshape(len(given), -1)
    columns = min(given.shape[1], 6)
    figure = Figure(figsize=(1 + 3 * columns, 3), layout="constrained")
    outputs = _outputs(table)
    for number, panel in enumerate(figure.subplots(1, columns, squeeze=False).flat):
        known = given[~given[:, number].isnan(), number]
        taken = table.label[table.accepted & (outputs == number)].double()
        both = torch.cat([known, taken])
        ends = (float(both.min()), float(both.max()))
        for name, part in (("accepted pseudo-labels", taken), ("given labels", known)):
            if len(part):
                panel.hist(part.numpy(), bins=20, range=ends, density=True, histtype="step", label=name)
        panel.set(xlabel="value" if given.shape[1] == 1 else f"value {number}", ylabel="density")
    panel.legend(fontsize=8)
    return figure
