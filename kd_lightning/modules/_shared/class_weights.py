"""The hard loss of training with a weight for each class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from kd_lightning.batch import is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.modules._shared.label_counts import count_labels

Weights = Literal["balanced"] | Sequence[float]
_ARGUMENTS: dict[type[nn.Module], str] = {nn.CrossEntropyLoss: "weight", nn.BCEWithLogitsLoss: "pos_weight"}
_MOST_NAMED = 20


class ClassWeights:
    """A copy of the hard loss whose classes have weights. It is no module: a checkpoint does not hold the weights.

    Args:
        weights: One weight a class, or ``"balanced"``. Of the multiclass task, they are the ``weight`` of
            ``CrossEntropyLoss``; else the ``pos_weight`` of ``BCEWithLogitsLoss``, one for each label.
        hard_loss: The hard loss.
        task: The module's task.
        dense: Whether labels are dense.

    Raises:
        InputError: If a weight is out of range, or the loss takes no weights or has weights already.
    """

    def __init__(self, weights: Weights, hard_loss: nn.Module, task: Task, dense: bool) -> None:
        fits = nn.CrossEntropyLoss if task == "multiclass" else nn.BCEWithLogitsLoss
        if task == "regression" or type(hard_loss) is not fits:
            got = f"task: {task}" if task == "regression" else f"{type(hard_loss).__name__} for task: {task}"
            raise InputError(f"class_weights is for CrossEntropyLoss and BCEWithLogitsLoss, got {got}")
        if any(getattr(hard_loss, name, None) is not None for name in ("weight", "pos_weight")):
            raise InputError("class_weights: hard_loss has weights of its own; set one of them")
        if isinstance(weights, str):
            if weights != "balanced":
                raise InputError(f"class_weights must be balanced or a list of numbers, got {weights!r}")
            if dense:
                raise InputError("class_weights: balanced counts one label a sample, got class_dim; give a list")
        else:
            weights = weights.tolist() if hasattr(weights, "tolist") else weights  # of a tensor or an array
            if not isinstance(weights, Iterable) or not any(weights) or not all(map(_is_weight, weights)):
                raise InputError(
                    f"class_weights must be finite numbers of at least 0, not all of them 0, got {weights!r:.200}"
                )
        self.balanced = isinstance(weights, str)
        self._argument = _ARGUMENTS[fits]
        self._plain = hard_loss
        self._task = task
        self._loss: nn.Module | None = None
        if not isinstance(weights, str):
            self._set(torch.tensor([*map(float, weights)]))

    def balance(self, data: Any, num_classes: int | None) -> None:
        """Runs at the start of a fit. Computes balanced weights from the labels that training may see.

        Args:
            data: The datamodule.
            num_classes: Number of outputs. Default: None, which means that of the class names, or of the labels.

        Raises:
            InputError: If the datamodule does not give its labels, has none, or draws balanced samples already.
        """
        if getattr(data, "sampler", None) == "balanced":
            raise InputError("class_weights and data.sampler: balanced both correct the imbalance; set one of them")
        if not self.balanced:
            return
        if not hasattr(data, "visible_labels"):
            got = "no datamodule" if data is None else type(data).__name__
            raise InputError(
                f"class_weights: balanced needs a datamodule with visible_labels(), such as SemiSupervisedDataModule, "
                f"got {got}; give a list"
            )
        names = getattr(data, "class_names", None)
        classes = num_classes or (None if names is None else len(names))
        weights = balanced_weights(data.visible_labels(), self._task, classes)
        self._set(weights)
        if len(weights) <= _MOST_NAMED:
            known = names if names is not None and len(names) == len(weights) else range(len(weights))
            text = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(known, weights.tolist(), strict=True))
            rank_zero_info(f"class_weights: {text}")

    def loss(self, device: torch.device) -> nn.Module:
        """Return the loss, on a device."""
        if self._loss is None:
            raise InputError("class_weights: balanced is computed at the start of a fit; give a list to train without")
        self._loss = self._loss.to(device)
        return self._loss

    def _set(self, weights: Tensor) -> None:
        self._loss = deepcopy(self._plain)
        setattr(self._loss, self._argument, weights)


def balanced_weights(labels: Tensor, task: Task, classes: int | None = None) -> Tensor:
    """Return weights that are inversely proportional to the numbers of labels.

    Multiclass: n / (k n_c) with n labels, n_c of class c, and k classes that have labels: scikit-learn's "balanced"
    (https://scikit-learn.org/stable/modules/generated/sklearn.utils.class_weight.compute_class_weight.html). Of
    probabilities, n_c is their sum. Binary and multilabel: the number of zeros for each one of a label. A class without
    labels has weight 1, and so has a label that is always zero, or always one.

    Args:
        labels: (N,) class indices, or (N, C) probabilities; (N,) or (N, L) zeros and ones for the other tasks. -100 or
            NaN where missing.
        task: The task.
        classes: Number of classes. Default: None, which means the highest label and 1.

    Returns:
        (C,) float32, or (L,).

    Raises:
        InputError: If no label is known, or labels of the multiclass task are other numbers.
    """
    known = is_labeled(labels)
    if not known.any():
        raise InputError("class_weights: balanced counts the labels that training may see, but there are none")
    if task == "multiclass":
        counts = count_labels(labels, classes or 0, "class_weights: balanced")
        weights = counts.sum() / (int((counts > 0).sum()) * counts)
        absent = counts == 0
    else:
        values, rows = (part.view(len(part), -1) for part in (labels, known))
        ones = (rows & (values > 0.5)).sum(dim=0).double()
        weights = (rows.sum(dim=0) - ones) / ones
        absent = (ones == 0) | (weights == 0)
    if absent.any():
        numbers = ", ".join(map(str, absent.nonzero().flatten().tolist()[:_MOST_NAMED]))
        which = "classes without labels" if task == "multiclass" else "labels that are always 0, or always 1,"
        rank_zero_warn(f"class_weights: {which} have weight 1: {numbers}")
    return torch.where(absent, 1.0, weights).float()


def _is_weight(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return 0 <= float(value) <= torch.finfo(torch.float32).max
