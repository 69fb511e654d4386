"""Symmetric cross-entropy, for labels that may be wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import (
    Reduction,
    check_reduction,
    check_weight,
    gather_target,
    log_probabilities,
    reduce_rows,
)


class SymmetricCrossEntropyLoss(nn.Module):
    r"""Cross-entropy plus reverse cross-entropy, which wrong labels affect less.

    .. math:: \alpha \, (-\log p_y) + \beta \, (-A) (1 - p_y)

    The second term is the reverse cross-entropy :math:`-\sum_k p_k \log q_k` of the label's one-hot distribution q,
    where A takes the place of log 0.

    Source: Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels" (2019),
    https://arxiv.org/abs/1908.06112.

    Args:
        alpha: Weight of the cross-entropy, at least 0.
        beta: Weight of the reverse cross-entropy, at least 0.
        log_zero: A, finite and below 0.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or shapes or labels do not fit.

    >>> loss = SymmetricCrossEntropyLoss(alpha=0.0, beta=1.0, log_zero=-4.0)
    >>> loss(torch.tensor([0.25, 0.75]).log().unsqueeze(0), torch.tensor([0]))
    tensor(3.)
    """

    def __init__(
        self, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        if not -math.inf < log_zero < 0:
            raise InputError(f"log_zero must be finite and below 0, got {log_zero}")
        check_reduction(reduction)
        self.alpha = float(alpha)
        self.beta = float(beta)
        self.log_zero = float(log_zero)
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = gather_target(log_probabilities(logits, target), target)
        rows = -self.alpha * log_p + self.beta * self.log_zero * torch.expm1(log_p)
        return reduce_rows(rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        values = f"alpha={self.alpha}, beta={self.beta}, log_zero={self.log_zero}"
        return f"{values}, reduction={self.reduction!r}"
