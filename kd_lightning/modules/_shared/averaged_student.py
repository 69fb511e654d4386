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


def start_average(averaged: AveragedModel, student: nn.Module) -> None:
    """Runs at the start of a fit. Copies the student, which may have got other weights, into an average without a step.

    Raises:
        InputError: If weights that it follows are of half precision. It moves by a thousandth of its distance in a
            step, which rounding to 8 or 11 bits removes, so it would stand still.
    """
    half = (torch.bfloat16, torch.float16)
    found = next((p.dtype for p in student.parameters() if p.requires_grad and p.dtype in half), None)
    if found is not None:
        name = str(found).removeprefix("torch.")
        precision = "bf16-mixed" if found == torch.bfloat16 else "16-mixed"
        raise InputError(
            f"ema_decay: an average of {name} weights stands still; set precision: {precision}, or leave out ema_decay"
        )
    if not int(averaged.n_averaged):
        averaged.update_parameters(student)
        averaged.n_averaged.zero_()
