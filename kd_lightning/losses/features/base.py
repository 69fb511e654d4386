"""What the feature losses share: checks, types, and the positions that count."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import at_least_float32


def pair_features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two features of one shape in the student's type, at least float32; the teacher's has no gradient.

    Args:
        student: (B, C, ...), after the projector.
        teacher: (B, C, ...).

    Raises:
        InputError: If their shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"features of student and teacher must have one shape, got {[*student.shape]} and {[*teacher.shape]}; "
            "a projector joins them"
        )
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def pair_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two features of any shapes in the student's type, at least float32; their numbers of samples must agree.

    Args:
        student: (B, ...).
        teacher: (B, ...). The result has no gradient.

    Raises:
        InputError: If their numbers of samples differ.
    """
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise InputError(
            f"features of student and teacher must be (B, C, ...) of the same samples, got {[*student.shape]} and "
            f"{[*teacher.shape]}"
        )
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def counted_positions(feature: Tensor, batch: Batch | None) -> Tensor | None:
    """Return which positions of a feature count, (B, P) booleans; None if all do, or if the mask has other positions.

    Args:
        feature: (B, C, ...), with P positions after the channels.
        batch: The batch, whose ``position_mask`` may leave some out.
    """
    mask = None if batch is None else batch.position_mask
    if mask is None or mask.shape != feature.shape[:1] + feature.shape[2:]:
        return None
    return mask.to(feature.device, torch.bool).flatten(1)
