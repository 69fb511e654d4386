"""What every loss on a pair of logits shares: checks, precision, standardisation, divergence, reduction."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import InputError

Task = Literal["multiclass", "multilabel", "binary"]
Reduction = Literal["mean", "none"]


def check_task(task: str) -> None:
    """Raise InputError unless ``task`` is one of the three."""
    if task not in get_args(Task):
        raise InputError(f"task must be one of {get_args(Task)}, got {task!r}")


def check_reduction(reduction: str) -> None:
    """Raise InputError unless ``reduction`` is "mean" or "none"."""
    if reduction not in get_args(Reduction):
        raise InputError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")


def check_temperature(temperature: float) -> None:
    """Raise InputError unless ``temperature`` is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be finite and above 0, got {temperature}")


def check_weight(name: str, weight: float) -> None:
    """Raise InputError unless ``weight`` is finite and not negative."""
    if not 0 <= weight < math.inf:
        raise InputError(f"{name} must be finite and at least 0, got {weight}")


def pair_logits(student_logits: Tensor, teacher_logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Check both sides' shapes and return them as (B, C), in at least float32.

    Args:
        student_logits: (B, C), C >= 2, for multiclass; (B, L) for multilabel; (B,) or (B, 1) for binary.
        teacher_logits: As the student's; for binary either of the two shapes.
        task: What the logits mean.

    Returns:
        Student's and teacher's logits: half precision becomes float32, float64 stays, binary becomes (B, 1).

    Raises:
        InputError: The shapes differ, or don't fit the task.
    """
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if task == "binary":
        if any(not shape or shape[1:] not in ((), (1,)) for shape in shapes):
            raise InputError("binary logits must be (B,) or (B, 1), got student {} and teacher {}".format(*shapes))
        student_logits, teacher_logits = student_logits.reshape(-1, 1), teacher_logits.reshape(-1, 1)
    if student_logits.shape != teacher_logits.shape:
        raise InputError("student and teacher logits must have one shape, got {} and {}".format(*shapes))
    if student_logits.ndim != 2:
        raise InputError(f"{task} logits must have 2 dimensions (batch, classes), got shape {shapes[0]}")
    if task == "multiclass" and student_logits.shape[1] < 2:
        raise InputError(f"multiclass logits need at least 2 classes, got shape {shapes[0]}; is the task binary?")
    return _upcast(student_logits), _upcast(teacher_logits)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def standardize_logits(logits: Tensor) -> Tensor:
    """Give every row of (B, C) logits mean 0 and (unbiased) standard deviation 1; constant rows become 0."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    std = logits.std(dim=1, keepdim=True)
    # Rows constant to rounding aren't scaled: gradients of 1e7 would throw the student far off and overflow float16.
    constant = std <= 4 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1, keepdim=True)
    return centred / (1e-7 + std).masked_fill(constant, 1)


def kl_divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, summed over the last dimension."""
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=-1)


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Return (B,) values as they are ("none") or their mean; the mean of no rows is 0, in the graph."""
    return rows if reduction == "none" else rows.sum() / max(len(rows), 1)
