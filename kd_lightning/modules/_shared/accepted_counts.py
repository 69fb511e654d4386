"""How many pseudo-labels of an epoch count, for a warning."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.ranks import sum_over_ranks


class AcceptedCounts:
    """The numbers of unlabeled and of accepted rows in the steps of an epoch, on this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Runs at the start of an epoch."""
        self._unlabeled = self._accepted = torch.zeros(())

    def add(self, weight: Tensor) -> None:
        """Add the weights (U,) of the unlabeled rows of a step."""
        self._unlabeled = self._unlabeled + len(weight)
        self._accepted = self._accepted.to(weight.device) + weight.sum()

    def of_all_processes(self, device: torch.device) -> Tensor:
        """Return both numbers, (2,) on a device. All processes must call this."""
        return sum_over_ranks(
            torch.stack([part.to(device, torch.float32) for part in (self._unlabeled, self._accepted)])
        )

    def restore(self, counts: tuple[Tensor, Tensor]) -> None:
        """Restore both numbers of all processes, on the first one."""
        self._unlabeled, self._accepted = counts

    def warn(self, device: torch.device, selection: str | None) -> None:
        """Runs at the end of an epoch, on all processes. Warns if there was no unlabeled row, or no accepted one.

        Args:
            device: The module's device.
            selection: The selection, which may have accepted none. None for a run where that needs no warning.
        """
        unlabeled, accepted = self.of_all_processes(device).tolist()
        if not unlabeled:
            rank_zero_warn("no batch of this epoch had an unlabeled sample (y = -100): nothing to pseudo-label")
        elif selection is not None and not accepted:
            rank_zero_warn(
                f"no pseudo-label of this epoch was accepted ({selection}), so the student trained on the labels "
                "alone; lower the threshold, or train longer on the labels first"
            )
