"""The soft loss of the modules that learn from a teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task, supports_top_k
from kd_lightning.losses.protocols import is_own
from kd_lightning.teachers.teacher import Teacher


def make_soft_loss(
    soft_loss: nn.Module | None, task: Task, teachers: Iterable[nn.Module | None] = (), temperature: float = 4.0
) -> nn.Module:
    """Check a given soft loss, or make the default one.

    Args:
        soft_loss: The given loss. If None, ``KDLoss`` of the task; ``MSELoss`` for regression.
        task: The module's task.
        teachers: The module's teachers.
        temperature: Temperature of the default loss, above 0.

    Raises:
        InputError: If the loss is of another task, or needs all logits while a teacher's cache holds its top k alone.
    """
    if soft_loss is None:
        soft_loss = nn.MSELoss() if task == "regression" else KDLoss(temperature=temperature, task=task)
    if getattr(soft_loss, "task", task) != task:
        raise InputError(f"soft_loss is for the {soft_loss.task} task, but the module's task is {task}")
    check_takes_logits(soft_loss)
    check_top_k(soft_loss, teachers)
    return soft_loss


_OF_PROBABILITIES = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.BCELoss, nn.NLLLoss, nn.KLDivLoss)


def check_takes_logits(soft_loss: nn.Module) -> None:
    """Raise InputError for a loss of torch whose target is probabilities or classes: it would get logits."""
    if type(soft_loss) in _OF_PROBABILITIES:
        raise InputError(
            f"soft_loss: {type(soft_loss).__name__} needs probabilities or classes as its target, but a soft loss gets "
            "logits of student and teacher; use KDLoss, or a loss of your own"
        )


def check_top_k(soft_loss: nn.Module, teachers: Iterable[nn.Module | None]) -> None:
    """Raise InputError if a soft loss needs all logits while a teacher's cache holds its top k alone."""
    top_k = any(isinstance(teacher, Teacher) and teacher.cache_top_k is not None for teacher in teachers)
    if top_k and not supports_top_k(soft_loss):
        raise InputError(
            f"soft_loss: {soft_loss} needs all logits, but a teacher's cache_top_k stores its highest ones alone; "
            "leave cache_top_k out, or use KDLoss or DKDLoss without standardize"
        )


def call_soft_loss(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    """Call a soft loss with the outputs of student and teacher, and with the target if it takes a third argument."""
    if teacher.shape != student.shape and teacher.numel() == student.numel() and not is_own(loss):
        teacher = teacher.reshape(student.shape)  # (B,) and (B, 1) of one output; torch's losses would broadcast
    if not student.numel():  # no position counts; the mean of torch's losses would be NaN
        return student.sum()
    value: Tensor = loss(student, teacher, target) if takes_target(loss) else loss(student, teacher)
    return value


def takes_target(loss: nn.Module) -> bool:
    """Whether a soft loss takes a third argument, the target. The losses of torch do not."""
    forward: Any = loss.forward
    return _takes_three(getattr(forward, "__func__", forward), inspect.ismethod(forward))


@lru_cache
def _takes_three(forward: Callable[..., Any], is_method: bool) -> bool:
    try:
        parameters = [*inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):
        return False
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return True
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in by_position for kind in kinds) - is_method > 2
