"""Means over an epoch, for logging."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EpochMeans:
    """Weighted means of values by name. Sums stay on the device of their values, so no step synchronizes.

    Lightning's ``self.log`` would take half a millisecond for each value of each step.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, value: float | Tensor, weight: float) -> None:
        """Add a value with its weight."""
        value = value.detach().float() if isinstance(value, Tensor) else value
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total + value * weight, weights + weight

    def compute_and_reset(
        self, device: torch.device, sum_over_processes: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return the means over all processes, by name, and remove all values.

        Args:
            device: The device of the means.
            sum_over_processes: Sums a tensor over all processes. They must all have the same names.
        """
        names = sorted(self._sums)
        totals = [torch.as_tensor(self._sums[name][0], dtype=torch.float32, device=device) for name in names]
        weights = torch.tensor([self._sums[name][1] for name in names], dtype=torch.float32, device=device)
        sums = sum_over_processes(torch.stack([torch.stack(totals), weights]))
        self._sums.clear()
        return dict(zip(names, sums[0] / sums[1], strict=True))
