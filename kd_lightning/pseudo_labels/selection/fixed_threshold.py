"""One threshold for all pseudo-labels (FixMatch)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.pseudo_labels.selection.base import Selection, check_share, most_probable


class FixedThreshold(Selection):
    """Accept the class of each row whose probability is at least ``threshold``.

    Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", 2020,
    https://arxiv.org/abs/2001.07685.

    Args:
        threshold: In [0, 1]. 0 accepts all.

    >>> target, weight = FixedThreshold(0.8)(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.zeros(0, 2), None)
    >>> target.tolist(), weight.tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0])
    """

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        check_share("threshold", threshold)
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        confidence, _, target = most_probable(probabilities)
        return target, (confidence >= self.threshold).to(confidence)

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"threshold={self.threshold}"
