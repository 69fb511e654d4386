"""Soft losses that treat the target class apart from the other classes."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, class_labels
from kd_lightning.errors import InputError


def target_class(owner: str, target: Tensor | None, teacher: Tensor) -> Tensor:
    """Check a soft loss's target, and return the target class of each row, (B, 1).

    Args:
        owner: Name of the loss in error messages.
        target: (B,) long, class indices or -100 for an unlabeled row; or probabilities (B, C), which mean the most
            likely class, or NaN. An unlabeled row takes the teacher's most likely class.
        teacher: The teacher's logits, (B, C).

    Raises:
        InputError: If the target is missing, or of another shape or type.
    """
    if target is None:
        raise InputError(f"target must be given to {owner}, got None")
    target = class_labels(target) if target.shape == teacher.shape else target
    if target.dtype != torch.long or target.shape != teacher.shape[:1]:
        rows, shape = tuple(teacher.shape[:1]), tuple(target.shape)
        raise InputError(f"target must be long of shape {rows}, got {target.dtype} of shape {shape}")
    return torch.where(target == IGNORE_INDEX, teacher.argmax(dim=1), target).unsqueeze(1)


def split_target(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Split the classes of logits (B, C), C >= 2, into the target class (B, 1) and the others.

    Returns:
        The log-probabilities of target and rest, (B, 2), and those of the other classes within the rest, (B, C - 1).
    """
    # The others are gathered, since masking the target would put infinities into the graph.
    numbers = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, numbers + (numbers >= target))
    rest = others.logsumexp(dim=1, keepdim=True)
    pair = torch.cat([logits.gather(1, target), rest], dim=1) - logits.logsumexp(dim=1, keepdim=True)
    return pair, others - rest
