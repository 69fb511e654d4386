"""FlexMatch: a threshold for each class, which follows how well the class is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveThresholds(nn.Module):
    """A threshold for each class, by the number of samples that are confidently predicted as this class.

    Let sigma_c be the number of unlabeled samples whose last confident prediction (at least ``threshold``) is class c,
    and ``beta_c = sigma_c / max(max sigma, samples without a confident prediction)``. The threshold of class c is
    ``threshold * beta_c / (2 - beta_c)``. It is low for a class that is learned slowly, and for every class at first.

    Zhang et al., "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling", 2021,
    https://arxiv.org/abs/2110.08263.

    Args:
        threshold: Highest threshold, in (0, 1].
        pool: Number of unlabeled samples.
        samples: Number of all samples: every index is below it.

    Attributes:
        last_class: Class of the last confident prediction by index, (samples,); -1 if there was none.
    """

    def __init__(self, threshold: float, pool: int, samples: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.pool = pool
        self.last_class: Tensor
        self.register_buffer("last_class", torch.full((samples,), -1), persistent=False)

    def forward(self, classes: int) -> Tensor:
        """The threshold of each class, (C,), for ``classes`` = C."""
        counts = torch.bincount(self.last_class[self.last_class >= 0], minlength=classes).float()
        beta = counts / torch.maximum(counts.max(), self.pool - counts.sum()).clamp_min(1.0)
        return self.threshold * beta / (2 - beta)

    def update(self, index: Tensor, label: Tensor) -> None:
        """Record confident predictions: indices (N,) and classes (N,), -1 for a sample without one."""
        confident = label >= 0
        self.last_class[index[confident]] = label[confident]
