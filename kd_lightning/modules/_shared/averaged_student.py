"""The running average of a student that trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_lightning.errors import InputError


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """Make the running average of a student's parameters and buffers."""

    def update(averages: Any, values: Any, count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    averaged = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    averaged.requires_grad_(False)
    return averaged


def check_precision(student: nn.Module) -> None:
    """Raise InputError if the weights that an average follows are of half precision: it would stand still.

    The average moves by a thousandth of its distance in a step, which rounding to 8 or 11 bits removes.
    """
    half = (torch.bfloat16, torch.float16)
    found = next((p.dtype for p in student.parameters() if p.requires_grad and p.dtype in half), None)
    if found is not None:
        name = str(found).removeprefix("torch.")
        precision = "bf16-mixed" if found == torch.bfloat16 else "16-mixed"
        raise InputError(
            f"ema_decay: an average of {name} weights stands still; set precision: {precision}, or leave out ema_decay"
        )
