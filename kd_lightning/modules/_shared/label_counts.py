"""Numbers of the labels of each class that training may see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.logit_adjustment import LogitAdjustmentLoss

_MOST_NAMED = 20


def count_labels(labels: Tensor, classes: int, owner: str) -> Tensor:
    """Return the number of labels of each class, (C,) float64.

    Args:
        labels: (N,) class indices, or (N, C) probabilities, of which the number is the sum; -100 or NaN where missing.
        classes: Lowest number C of classes.
        owner: What counts, for the message.

    Raises:
        InputError: If a label is no whole number.
    """
    known = is_labeled(labels)
    labels = labels[known if labels.ndim == 1 else known.all(dim=1)]
    if labels.ndim == 2:
        return labels.double().sum(dim=0)
    if (wrong := labels[(labels < 0) | (labels != labels.trunc())]).numel():
        raise InputError(f"{owner} needs whole class numbers as labels, got {wrong[0].item():g}")
    return torch.bincount(labels.long(), minlength=classes).double()


def count_each_class(data: Any, num_classes: int | None, owner: str) -> Tensor:
    """Return the number of labels of each class that training may see, (C,) float64, all of them above 0.

    Args:
        data: The datamodule of a fit.
        num_classes: Number of classes. None means that of the class names, or of the labels.
        owner: What counts, for the message.

    Raises:
        InputError: If the datamodule does not give its labels, or draws as many samples of each class; if there are no
            labels, or a class has none.
    """
    if not hasattr(data, "visible_labels"):
        got = "no datamodule" if data is None else type(data).__name__
        raise InputError(
            f"{owner} counts labels, so it needs a datamodule with visible_labels(), such as "
            f"SemiSupervisedDataModule, got {got}"
        )
    if getattr(data, "sampler", None) == "balanced":
        raise InputError(f"{owner} and data.sampler: balanced both correct the imbalance; set one of them")
    names = getattr(data, "class_names", None)
    labels = data.visible_labels()
    if not is_labeled(labels).any():
        raise InputError(f"{owner} counts the labels that training may see, but there are none")
    counts = count_labels(labels, num_classes or (0 if names is None else len(names)), owner)
    if missing := (counts == 0).nonzero().flatten().tolist()[:_MOST_NAMED]:
        named = [names[c] if names is not None and len(names) == len(counts) else c for c in missing]
        raise InputError(f"{owner} needs a label of each class, but there is none of {', '.join(map(str, named))}")
    return counts


def count_for_losses(loss: nn.Module, data: Any, num_classes: int | None, *, dense: bool) -> None:
    """Runs at the start of a fit. Gives the numbers to each loss inside a hard loss that counts labels.

    Args:
        loss: The hard loss.
        data: The datamodule.
        num_classes: Number of outputs, see :func:`count_each_class`.
        dense: Whether samples have more than one label each, which are not in memory.

    Raises:
        InputError: If they cannot be counted.
    """
    for part in loss.modules():
        if isinstance(part, LogitAdjustmentLoss) and part.counts_labels:
            if dense:
                raise InputError("LogitAdjustmentLoss counts one label a sample, got class_dim; give priors")
            part.count_labels(count_each_class(data, num_classes, "LogitAdjustmentLoss"))
