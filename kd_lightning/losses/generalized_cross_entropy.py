"""Generalised cross-entropy, for labels that may be wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, check_reduction, gather_target, log_probabilities, reduce_rows


class GeneralizedCrossEntropyLoss(nn.Module):
    r"""A loss between cross-entropy (limit q = 0) and mean absolute error (q = 1), which wrong labels affect less.

    .. math:: \frac{1 - p_y^q}{q}

    for the probability :math:`p_y` of the label. If truncated at k, a row with :math:`p_y \le k` has the constant
    value :math:`(1 - k^q) / q` and no gradient.

    Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels"
    (2018), https://arxiv.org/abs/1805.07836, which takes q = 0.7 and k = 0.5.

    Args:
        q: In (0, 1].
        truncation: k, in [0, 1). An untrained network of many classes would get no gradient, so start with 0 and set k
            later. Default: None, which means 0: no truncation.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or shapes or labels do not fit.

    >>> loss = GeneralizedCrossEntropyLoss(q=0.5)
    >>> loss(torch.tensor([0.25, 0.75]).log().unsqueeze(0), torch.tensor([0]))
    tensor(1.)
    """

    def __init__(self, q: float = 0.7, truncation: float | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        if not 0.0 < q <= 1.0:
            raise InputError(f"q must lie in (0, 1], got {q}; its limit at 0 is torch.nn.CrossEntropyLoss")
        if truncation is not None and not 0.0 <= truncation < 1.0:
            raise InputError(f"truncation must lie in [0, 1), or be null for none, got {truncation}")
        check_reduction(reduction)
        self.q = float(q)
        self.truncation = truncation
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = gather_target(log_probabilities(logits, target), target)
        if self.truncation:
            log_p = log_p.clamp_min(math.log(self.truncation))
        return reduce_rows(-torch.expm1(self.q * log_p) / self.q, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"q={self.q}, truncation={self.truncation}, reduction={self.reduction!r}"
