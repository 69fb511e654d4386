"""Metrics and figures of a round of pseudo-labels."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.pseudo_labels.table import PseudoLabels


def round_metrics(table: PseudoLabels, given: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Metrics of a round, all in [0, 1].

    Args:
        table: The round.
        given: Labels of the labeled samples, (M,).
        truth: True labels of the pool, (N,), -100 where unknown. If None, all are unknown.

    Returns:
        By name: ``coverage`` (mean weight: the accepted share, if weights are 0 or 1), ``confidence`` (mean), ``flips``
        (share of changed labels), ``class_distance`` (total variation distance between the class shares of accepted
        and given labels; absent if either is empty), ``precision`` (of labels whose truth is known; absent if none is)
        and ``accepted_precision`` (of the accepted ones among these; absent if there are none).
    """
    accepted = table.accepted
    values = {
        "coverage": float(table.weight.double().mean()),
        "confidence": float(table.confidence.double().mean()),
        "flips": float(table.changed.double().mean()),
    }
    if accepted.any() and len(given):
        shares = class_shares(table, given)
        values["class_distance"] = float((shares[0] - shares[1]).abs().sum() / 2)
    known = torch.zeros_like(accepted) if truth is None else truth != IGNORE_INDEX
    if known.any():
        correct = torch.eq(table.label, torch.as_tensor(truth)).double()
        values["precision"] = float(correct[known].mean())
        if (known & accepted).any():
            values["accepted_precision"] = float(correct[known & accepted].mean())
    return values


def class_shares(table: PseudoLabels, given: Tensor) -> Tensor:
    """Class shares of accepted labels and of given labels, (2, C)."""
    labels = (table.label[table.accepted], given)
    classes = int(torch.cat([*labels, table.label]).max()) + 1
    counts = torch.stack([torch.bincount(part, minlength=classes).double() for part in labels])
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)


def confidence_figure(table: PseudoLabels, threshold: float | None) -> Figure:
    """Draw a histogram of a round's confidences, with a line at the threshold if there is one."""
    histogram = Figure(figsize=(5, 3), layout="constrained")
    panel = histogram.subplots()
    panel.hist(table.confidence.numpy(), bins=40, range=(0.0, 1.0))
    if threshold is not None:
        panel.axvline(threshold, color="C3", label=f"threshold {threshold:g}")
        panel.legend()
    panel.set(xlabel="confidence", ylabel="samples")
    panel.set_title(f"round {table.round}: {int(table.accepted.sum())} of {len(table.label)} accepted", fontsize=9)
    return histogram


def class_figure(table: PseudoLabels, given: Tensor) -> Figure:
    """Draw the class shares of a round's accepted labels and of given labels (M,)."""
    shares = class_shares(table, given)
    classes = Figure(figsize=(max(5.0, min(0.3 * shares.shape[1], 20.0)), 3), layout="constrained")
    panel = classes.subplots()
    for number, (name, share) in enumerate(zip(("accepted pseudo-labels", "given labels"), shares, strict=True)):
        if len(share) > 200:  # a bar for each class would take seconds
            panel.stairs(share.numpy(), baseline=None, label=name)
            continue
        positions = [position + 0.4 * (number - 0.5) for position in range(len(share))]
        panel.bar(positions, share.numpy(), width=0.4, label=name)
    panel.set(xlabel="class", ylabel="share")
    panel.legend(fontsize=8)
    return classes
