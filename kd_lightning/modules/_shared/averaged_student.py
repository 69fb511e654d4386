"""The running average of a student that trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


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
