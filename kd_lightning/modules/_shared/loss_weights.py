"""Weights of classes and labels in torch's losses."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.losses.label_kind import LabelKindLoss
from kd_lightning.losses.logit_adjustment import LogitAdjustmentLoss

_BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss, nn.MultiLabelSoftMarginLoss)
_BY_LABEL = (nn.BCEWithLogitsLoss, nn.BCELoss)


def check_loss_weights(loss: nn.Module, logits: Tensor, task: Task, by_class_weights: bool = False) -> None:
    """Raise InputError if ``weight`` or ``pos_weight`` of a loss of torch does not fit the outputs. Reads shapes alone.

    Torch refuses only some of these, within a step. Weights of the wrong number can also meet the rows of a batch.

    Args:
        loss: The hard loss, or a LabelKindLoss of such losses. A subclass with a ``forward`` of its own may use its
            weights for anything.
        logits: The student's logits.
        task: The module's task.
        by_class_weights: Whether the weights come from the argument ``class_weights``.
    """
    parts = loss.named_modules(prefix="hard_loss") if isinstance(loss, LabelKindLoss) else [("hard_loss", loss)]
    for place, part in parts:
        _check_weights(place, part, logits, task, by_class_weights)


def _check_weights(place: str, loss: nn.Module, logits: Tensor, task: Task, by_class_weights: bool) -> None:
    forward: Any = getattr(type(loss), "forward", None)
    by_label = forward in [kind.forward for kind in _BY_LABEL]
    if not by_label and forward not in [kind.forward for kind in _BY_CLASS]:
        return
    outputs = 1 if task == "binary" else logits.shape[-1]
    for name in ("weight", "pos_weight"):
        weight: Tensor | None = getattr(loss, name, None)
        if weight is None:
            continue
        allowed: set[tuple[int, ...]] = {(outputs,)}
        if by_label:  # also one number for all
            allowed |= {(), (1,), (1, 1), (1, outputs)}
        if tuple(weight.shape) not in allowed:
            name = "class_weights" if by_class_weights else f"{place}.{name}"
            hint = "; balanced needs num_classes if classes have no names" if by_class_weights else ""
            raise InputError(
                f"{name} must hold one number for each of the student's {outputs} outputs, got the shape "
                f"{[*weight.shape]}{hint}"
            )
        if not weight.is_floating_point():
            raise InputError(f"{place}.{name} must hold floating point numbers, got {weight.dtype}")


def without_class_weights(loss: nn.Module) -> nn.Module:
    """Return a copy of a loss that takes all classes alike; the loss itself if it does.

    In it, torch's losses of classes have no ``weight``, and logit adjustment is in eval mode.
    """
    kinds = (nn.CrossEntropyLoss, nn.NLLLoss)

    def is_weighted(part: nn.Module) -> bool:
        return isinstance(part, LogitAdjustmentLoss) or (isinstance(part, kinds) and part.weight is not None)

    if not any(map(is_weighted, loss.modules())):
        return loss
    plain = deepcopy(loss)
    for part in filter(is_weighted, plain.modules()):
        if isinstance(part, LogitAdjustmentLoss):
            part.eval()
        else:
            part.weight = None  # type: ignore[assignment]
    return plain
