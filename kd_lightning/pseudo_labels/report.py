"""Metrics and figures of a round of pseudo-labels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PseudoLabels
from kd_lightning.runs.csv_logger import read_metrics


def round_metrics(table: PseudoLabels, given: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Metrics of a round, all in [0, 1].

    Args:
        table: The round.
        given: Labels of the labeled samples, (M,); of several labels each (M, L), -100 where one is missing.
        truth: True label of each row, (N,), -100 where unknown. If None, all are unknown.

    Returns:
        By name: ``coverage`` (mean weight: the accepted share, if weights are 0 or 1), ``confidence`` (mean), ``flips``
        (share of changed labels), ``class_distance`` (total variation distance between the class shares of accepted
        and given labels; of several labels the mean difference of the shares of a 1; absent if either is empty),
        ``precision`` (of labels whose truth is known; absent if none is) and ``accepted_precision`` (of the accepted
        ones among these; absent if there are none).
    """
    accepted = table.accepted
    values = {
        "coverage": float(table.weight.double().mean()),
        "confidence": float(table.confidence.double().mean()),
        "flips": float(table.changed.double().mean()),
    }
    if accepted.any() and len(given):
        accepted_shares, given_shares = class_shares(table, given)
        distance = (accepted_shares - given_shares).abs()
        values["class_distance"] = float(distance.sum() / 2 if table.output is None else distance.nanmean())
    known = torch.zeros_like(accepted) if truth is None else truth != IGNORE_INDEX
    if known.any():
        correct = torch.eq(table.label, torch.as_tensor(truth)).double()
        values["precision"] = float(correct[known].mean())
        if (known & accepted).any():
            values["accepted_precision"] = float(correct[known & accepted].mean())
    return values


def class_shares(table: PseudoLabels, given: Tensor) -> Tensor:
    """Class shares of accepted labels and of given labels, (2, C).

    Of several labels, the shares of a 1 among the accepted and the given ones of each label, (2, L); NaN without any.
    """
    if table.output is not None:
        found = torch.full((len(table.label), given.shape[1]), IGNORE_INDEX)
        rows = table.accepted.nonzero().flatten()
        found[rows, table.output[rows]] = table.label[rows].long()
        return torch.stack([_positive_shares(found), _positive_shares(given)])
    labels = (table.label[table.accepted], given)
    classes = int(torch.cat([*labels, table.label]).max()) + 1
    counts = torch.stack([torch.bincount(part, minlength=classes).double() for part in labels])
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)


def _positive_shares(labels: Tensor) -> Tensor:
    """Return the shares of a 1 among the known labels of each column, (L,), of (N, L)."""
    return torch.where(labels != IGNORE_INDEX, labels.double(), torch.nan).nanmean(dim=0)


def true_labels(table: PseudoLabels, truth_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the true label of each row, (N,), -100 where it is unknown.

    Args:
        table: The round.
        truth_of: Returns the true labels of samples (M,), by index: (M,) or (M, L), -100 or NaN where unknown.
    """
    samples, row = torch.unique(table.index, return_inverse=True)
    truth = truth_of(samples)
    truth = torch.where(is_labeled(truth), truth, IGNORE_INDEX).long()
    return truth[row] if table.output is None else truth[row, table.output]


def confidence_figure(table: PseudoLabels, threshold: float | None) -> Figure:
    """Draw a histogram of a round's confidences, with a line at the threshold if there is one."""
    histogram = Figure(figsize=(5, 3), layout="constrained")
    panel = histogram.subplots()
    panel.hist(table.confidence.numpy(), bins=40, range=(0.0, 1.0))
    if threshold is not None:
        panel.axvline(threshold, color="C3", label=f"threshold {threshold:g}")
        panel.legend()
    panel.set(xlabel="confidence", ylabel="samples" if table.output is None else "labels")
    panel.set_title(f"round {table.round}: {int(table.accepted.sum())} of {len(table.label)} accepted", fontsize=9)
    return histogram


def class_figure(table: PseudoLabels, given: Tensor) -> Figure:
    """Draw the class shares of a round's accepted labels and of given labels (M,)."""
    shares = class_shares(table, given).nan_to_num(0)
    classes = Figure(figsize=(max(5.0, min(0.3 * shares.shape[1], 20.0)), 3), layout="constrained")
    panel = classes.subplots()
    for number, (name, share) in enumerate(zip(("accepted pseudo-labels", "given labels"), shares, strict=True)):
        if len(share) > 200:  # a bar for each class would take seconds
            panel.stairs(share.numpy(), baseline=None, label=name)
            continue
        positions = [position + 0.4 * (number - 0.5) for position in range(len(share))]
        panel.bar(positions, share.numpy(), width=0.4, label=name)
    panel.set(xlabel="class", ylabel="share" if table.output is None else "share of 1")
    panel.legend(fontsize=8)
    return classes


def rounds_figure(runs: Mapping[str, Sequence[str | Path]]) -> Figure:
    """Draw the coverage of the pseudo-labels over training, and the precision of the accepted ones.

    Each method has one line, the mean over its runs. The band around it is one sample standard deviation. A round
    stands at the optimiser step at which it was logged, the end of the epoch that it starts. The precision is drawn if
    runs have logged it.

    Args:
        runs: For each method the folders of its runs, such as one for each seed. A folder has a ``metrics.csv`` with
            the rounds of ``PseudoLabelRefresh``.

    Raises:
        InputError: If there is no method, a method has no run, or a run has no rounds.
    """
    if not runs or not all(runs.values()):
        raise InputError(f"runs: at least one folder for each method, got {dict(runs)}")
    found = {method: [_logged_rounds(Path(folder)) for folder in folders] for method, folders in runs.items()}
    shares = {_COVERAGE: "accepted share of the pool, %", _PRECISION: "precision of the accepted, %"}
    known = {key for rounds in found.values() for one in rounds for row in one.values() for key in row}
    shares = {key: text for key, text in shares.items() if key in known}
    figure = Figure(figsize=(4.2 * len(shares), 3.2), layout="constrained")
    for panel, (key, text) in zip(figure.subplots(1, len(shares), squeeze=False).flat, shares.items(), strict=True):
        for number, (method, rounds) in enumerate(found.items()):
            steps = sorted({step for one in rounds for step, row in one.items() if key in row})
            values = [[100 * one[step][key] for one in rounds if key in one.get(step, {})] for step in steps]
            means = [statistics.mean(some) for some in values]
            spreads = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in values]
            panel.plot(steps, means, marker="o", markersize=3, color=f"C{number}", label=method)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            panel.fill_between(steps, low, high, color=f"C{number}", alpha=0.15)
        panel.set(xlabel="optimiser step", ylabel=text, ylim=(0, 103))
        panel.grid(alpha=0.3)
    panel.legend(loc="lower right", fontsize=8)
    return figure


_COVERAGE, _PRECISION = "pseudo_labels/coverage", "pseudo_labels/accepted_precision"


def _logged_rounds(folder: Path) -> dict[float, dict[str, float]]:
    """Return {step: {name: share}} of the rounds that a run has logged; InputError without any."""
    found: dict[float, dict[str, float]] = {}
    for row in read_metrics(folder / "metrics.csv"):
        shares = {key: row[key] for key in (_COVERAGE, _PRECISION) if math.isfinite(row.get(key, math.nan))}
        if shares:
            found.setdefault(row["step"], {}).update(shares)
    if not found:
        raise InputError(f"{folder} has no rounds of pseudo-labels in a metrics.csv; add PseudoLabelRefresh to its fit")
    return found
