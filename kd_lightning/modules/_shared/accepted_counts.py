"""How many pseudo-labels of an epoch count, and of which classes, for warnings."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.pseudo_labels.collapse import collapse_text
from kd_lightning.ranks import sum_over_ranks


class AcceptedCounts:
    """The numbers of unlabeled rows, of accepted ones and of labels in the steps of an epoch, on this process.

    In the multiclass task accepted rows and labels are counted by class.
    """

    def __init__(self) -> None:
        self.reset()
        self._has_warned_of_collapse = False

    def reset(self) -> None:
        """Runs at the start of an epoch."""
        self._unlabeled = self._accepted = self._labels = torch.zeros(())

    def add(self, weight: Tensor, target: Tensor | None, labels: Tensor | None) -> None:
        """Add the rows of a step.

        Args:
            weight: Weights of the unlabeled rows, (U,).
            target: Their pseudo-labels, (U, C). None if classes are not to be counted.
            labels: Classes of the labeled rows, (L,), of which others than 0 to C - 1 are not counted; or labels of
                mixed rows, (L, C). None without labels.
        """
        self._unlabeled = self._unlabeled + len(weight)
        accepted = weight.sum() if target is None else (weight[:, None] * target).sum(dim=0)
        self._accepted = self._accepted.to(weight.device) + accepted
        if target is not None:  # on all processes, also on one without labels
            labels = target.new_zeros(0) if labels is None else labels
            classes = torch.arange(target.shape[1], device=labels.device)
            known = labels[:, None] == classes if labels.ndim == 1 else labels
            self._labels = self._labels.to(labels.device) + known.sum(dim=0)

    def of_all_processes(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the numbers: (), () or (C,), and () or (C,). All processes must call this."""
        parts = self._unlabeled, self._accepted, self._labels
        return tuple(sum_over_ranks(part.to(device, torch.float32)) for part in parts)

    def restore(self, counts: tuple[Tensor, ...], first: bool) -> None:
        """Restore the numbers of all processes on the first one. Others begin with zeros."""
        own = (part if first else torch.zeros_like(part) for part in counts)
        self._unlabeled, self._accepted, self._labels = own

    def warn(self, device: torch.device, selection: str | None, early: bool) -> None:
        """Runs at the end of an epoch, on all processes.

        Warns if there was no unlabeled row, no accepted one, or, once, if one class absorbs the others.

        Args:
            device: The module's device.
            selection: The selection, which may have accepted none. None for a run that needs no warning of it.
            early: Whether pseudo-labels of one class are no surprise yet.
        """
        unlabeled, accepted, labels = (part.cpu() for part in self.of_all_processes(device))
        by_class = labels.ndim > 0 and not early and not self._has_warned_of_collapse
        if not unlabeled:
            rank_zero_warn("no batch of this epoch had an unlabeled sample (y = -100): nothing to pseudo-label")
        elif selection is not None and not accepted.any():
            rank_zero_warn(
                f"no pseudo-label of this epoch was accepted ({selection}), so the student trained on the labels "
                "alone; lower the threshold, or train longer on the labels first"
            )
        elif selection is not None and by_class and (text := collapse_text(accepted, labels, float(unlabeled))):
            self._has_warned_of_collapse = True
            rank_zero_warn(f"in this epoch, {text} ({selection})")
