"""Means over an epoch, for logging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from kd_lightning.modules._shared.hard_loss import must_synchronize

_KEY = "epoch_means"


class EpochMeans:
    """Weighted means of values by name.

    Sums of values on the CPU are Python's floats: a tensor's operations would take ten times as long. Other sums stay
    on the device of their values, so no step synchronizes. Lightning's ``self.log`` would take a third of a millisecond
    for each value of each step.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def clear(self) -> None:
        """Remove all values."""
        self._sums.clear()

    def add(self, name: str, value: float | Tensor, weight: float) -> None:
        """Add a value with its weight."""
        total, weights = self._sums.get(name, (0.0, 0.0))
        if isinstance(value, Tensor) and not must_synchronize(value):
            value = value.item()
        if not isinstance(value, Tensor):
            total = total + value * weight
        else:
            if not isinstance(total, Tensor):
                total = torch.full((), total, dtype=torch.float32, device=value.device)
            total.add_(value.detach(), alpha=weight)
        self._sums[name] = total, weights + weight

    def log(self, module: LightningModule) -> None:
        """Log the means over all processes, if there are any, and remove all values."""
        if not self:
            return
        means = self.compute_and_reset(module.device, partial(module.trainer.strategy.reduce, reduce_op="sum"))
        for name, mean in means.items():
            bar = name == "train/loss"
            module.log(name, mean, on_step=False, on_epoch=True, prog_bar=bar, batch_size=1, sync_dist=True)

    def compute_and_reset(
        self, device: torch.device, sum_over_processes: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return the means over all processes, by name, and remove all values.

        Args:
            device: The device of the means.
            sum_over_processes: Sums a tensor over all processes. They must all have the same names.
        """
        names = sorted(self._sums)
        sums = sum_over_processes(self._stack(names, device))
        self._sums.clear()
        return dict(zip(names, sums[0] / sums[1], strict=True))

    def store(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the sums over all processes to a checkpoint, which may be written within the epoch."""
        if module.trainer.world_size == 1:
            sums = {name: (float(total), weights) for name, (total, weights) in self._sums.items()}
        else:
            names = sorted(self._sums)
            columns = module.trainer.strategy.reduce(self._stack(names, module.device), reduce_op="sum").cpu()
            sums = {name: (float(columns[0, k]), float(columns[1, k])) for k, name in enumerate(names)}
        checkpoint[_KEY] = sums

    def restore(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the sums from a checkpoint: rank 0 gets those of all processes, other ranks get zeros."""
        is_first = module.trainer.is_global_zero
        sums = checkpoint.get(_KEY, {}).items()  # of earlier versions: tensors
        self._sums = {name: (float(of[0]), float(of[1])) if is_first else (0.0, 0.0) for name, of in sums}

    def _stack(self, names: list[str], device: torch.device) -> Tensor:
        """Return totals and weights by name, (2, N)."""
        totals = [torch.as_tensor(self._sums[name][0], dtype=torch.float32, device=device) for name in names]
        weights = torch.tensor([self._sums[name][1] for name in names], dtype=torch.float32, device=device)
        return torch.stack([torch.stack(totals) if totals else weights, weights])
