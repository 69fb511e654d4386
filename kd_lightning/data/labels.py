"""The labels that training batches are filled with."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.batch import MISSING, Batch, Kind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels import PseudoLabels


class Labels:
    """The visible label of each index, and pseudo-labels where there is none.

    Args:
        visible: (N,) class indices, or (N, L) zeros and ones; missing ones are -100 or NaN.
    """

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self.y = visible
        self.kind: Tensor | None = None
        self._soft: Tensor | None = None
        self._place = torch.empty(0, dtype=torch.long)

    def set(self, labels: PseudoLabels) -> None:
        """Fill in the accepted ones, in place of all that were set before.

        Raises:
            InputError: If a sample may have several labels, or a labeled or unknown sample is to be labeled.
        """
        if self.visible.ndim > 1 or self.visible.is_floating_point():
            raise InputError("pseudo-labels are for samples of one class each; these have many labels")
        known = is_labeled(self.visible)
        if len(labels.index) and int(labels.index.max()) >= len(known):
            raise InputError(f"pseudo-labels: sample {int(labels.index.max())}, but there are only {len(known)}")
        if known[labels.index].any():
            raise InputError(f"pseudo-labels: sample {int(labels.index[known[labels.index]][0])} has a label already")
        accepted = labels.index[labels.accepted]
        self.y = self.visible.clone()
        self.y[accepted] = labels.label[labels.accepted]
        self.kind = torch.where(known, Kind.CLEAN, Kind.MISSING).to(torch.int8)
        self.kind[accepted] = Kind.PSEUDO
        self._soft = labels.soft
        if labels.soft is not None:
            self._place = torch.full((len(known),), -1)
            self._place[accepted] = labels.accepted.nonzero().flatten()

    def fill(self, batch: Batch) -> Batch:
        """Give a batch its labels by index."""
        assert batch.index is not None
        batch.y = self.y[batch.index]
        if self.kind is not None:
            batch.kind = self.kind[batch.index]
        if self._soft is not None:
            place = self._place[batch.index]
            batch.soft = self._soft[place] * (place >= 0).unsqueeze(1)
        return batch

    def count(self, index: Tensor) -> tuple[int, int]:
        """How many known labels there are among some indices, and how many of these are pseudo-labels."""
        pseudo = 0 if self.kind is None else int((self.kind[index] == Kind.PSEUDO).sum())
        return int(is_labeled(self.y[index]).sum()), pseudo


def hide(truth: Tensor, labeled: list[int], size: int) -> Tensor:
    """The labels of ``size`` indices, where only the labeled ones can be seen: the others are -100, or NaN."""
    missing = float("nan") if truth.is_floating_point() else MISSING
    if truth.ndim > 1:  # of many labels each may be missing
        truth, missing = truth.float(), float("nan")
    labels = torch.full((size, *truth.shape[1:]), missing, dtype=truth.dtype)
    labels[labeled] = truth[labeled]
    return labels
