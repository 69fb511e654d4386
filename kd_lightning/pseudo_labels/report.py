"""Metrics and figures of a round of pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.pseudo_labels.table import PseudoLabels


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
