"""Means over an epoch, for the charts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EpochMeans:
    """Weighted means, summed up where their values are: neither does a step wait for them, nor do they slow it down.

    (Lightning's ``self.log`` takes half a millisecond for each value of each step.)
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, value: float | Tensor, weight: float) -> None:
        """Take in a value that counts so much."""
        value = value.detach().float() if isinstance(value, Tensor) else value
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total + value * weight, weights + weight

    def take(self, device: torch.device, over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The means, by name, and start anew.

        Args:
            device: Where they shall be.
            over_processes: Sums a tensor over all processes, which must have the same names.
        """
        names = sorted(self._sums)
        totals = [torch.as_tensor(self._sums[name][0], dtype=torch.float32, device=device) for name in names]
        weights = torch.tensor([self._sums[name][1] for name in names], dtype=torch.float32, device=device)
        sums = over_processes(torch.stack([torch.stack(totals), weights]))
        self._sums.clear()
        return dict(zip(names, sums[0] / sums[1], strict=True))
