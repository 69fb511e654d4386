"""FlexMatch's thresholds, which follow how well each class is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveThresholds(nn.Module):
    """A threshold for each class, from how many unlabeled samples it was confidently given to (Zhang et al. 2021).

    With sigma_c the number of samples whose last confident prediction (at least ``threshold``) was class c, and
    ``beta_c = sigma_c / max(max sigma, samples without one)``, that of class c is
    ``threshold * beta_c / (2 - beta_c)``: a class that is learned slowly, and every class at first, has a low one.

    Args:
        threshold: The highest, in (0, 1].
        pool: Number of unlabeled samples.
        samples: Their indices lie below this.
    """

    def __init__(self, threshold: float, pool: int, samples: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.pool = pool
        self.chosen: Tensor
        self.register_buffer("chosen", torch.full((samples,), -1), persistent=False)

    def forward(self, classes: int) -> Tensor:
        """The threshold of each class, (C,)."""
        counts = torch.bincount(self.chosen[self.chosen >= 0], minlength=classes).float()
        beta = counts / torch.maximum(counts.max(), self.pool - counts.sum()).clamp_min(1.0)
        return self.threshold * beta / (2 - beta)

    def note(self, index: Tensor, label: Tensor) -> None:
        """Take in confident predictions: samples (N,), and their classes (N,), -1 where there is none."""
        confident = label >= 0
        self.chosen[index[confident]] = label[confident]
