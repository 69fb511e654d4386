"""Exponential moving averages over the steps of a fit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import check_share
from kd_lightning.ranks import sum_over_ranks


class RunningMean(nn.Module):
    r"""The average :math:`m_t = \lambda m_{t-1} + (1 - \lambda) \bar{x}_t` of the means of each step.

    Args:
        momentum: lambda, in [0, 1). 0 means the mean of the last step alone.

    Attributes:
        value: The average, of any shape; empty until :meth:`start`.
    """

    value: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        check_share("momentum", momentum, to_1=False)
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(0))

    def start(self, value: float, *shape: int) -> None:
        """Set all numbers of the average before the first step."""
        self.value = self.value.new_full(shape, value)

    def update(self, mean: Tensor, count: Tensor) -> Tensor:
        """Move towards the mean of a step, and return the average. A step with a ``count`` of 0 rows changes nothing.

        Raises:
            InputError: If the average was started with another shape, or not at all.
        """
        if mean.shape != self.value.shape:
            raise InputError(
                f"a selection is set up for {self.value.numel()} classes, got probabilities of {mean.numel()}; call "
                "setup(num_samples, num_classes), as a fit does, or set num_classes"
            )
        moved = torch.lerp(mean.to(self.value), self.value, self.momentum)
        self.value.copy_(torch.where(count > 0, moved, self.value))
        return self.value


def mean_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the rows (N, ...) of all processes, and their number, (). The mean of no rows is 0."""
    count = torch.full((1,), float(len(rows)), dtype=rows.dtype, device=rows.device)
    total = sum_over_ranks(torch.cat([rows.sum(dim=0).flatten(), count]))
    return (total[:-1] / total[-1].clamp_min(1.0)).reshape(rows.shape[1:]), total[-1]
