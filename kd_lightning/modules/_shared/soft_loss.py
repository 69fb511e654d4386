"""The soft loss of the modules that learn from a teacher."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task, supports_top_k
from kd_lightning.teachers.teacher import Teacher


def make_soft_loss(
    soft_loss: nn.Module | None, task: Task, teachers: Iterable[nn.Module | None] = (), temperature: float = 4.0
) -> nn.Module:
    """Check a given soft loss, or make the default one.

    Args:
        soft_loss: The given loss. If None, ``KDLoss`` of the task.
        task: The module's task.
        teachers: The module's teachers.
        temperature: Temperature of the default loss, above 0.

    Raises:
        InputError: If the loss is of another task, or needs all logits while a teacher's cache holds its top k alone.
    """
    soft_loss = KDLoss(temperature=temperature, task=task) if soft_loss is None else soft_loss
    if getattr(soft_loss, "task", task) != task:
        raise InputError(f"soft_loss is for the {soft_loss.task} task, but the module's task is {task}")
    check_top_k(soft_loss, teachers)
    return soft_loss


def check_top_k(soft_loss: nn.Module, teachers: Iterable[nn.Module | None]) -> None:
    """Raise InputError if a soft loss needs all logits while a teacher's cache holds its top k alone."""
    top_k = any(isinstance(teacher, Teacher) and teacher.cache_top_k is not None for teacher in teachers)
    if top_k and not supports_top_k(soft_loss):
        raise InputError(
            f"soft_loss: {soft_loss} needs all logits, but a teacher's cache_top_k stores its highest ones alone; "
            "leave cache_top_k out, or use KDLoss or DKDLoss without standardize"
        )
