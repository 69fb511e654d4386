"""Logit adjustment: cross-entropy that learns a classifier for equally frequent classes from a long tail."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


class LogitAdjustmentLoss(nn.Module):
    r"""Cross-entropy of logits that are raised by the logarithm of each class's share of the labels.

    .. math:: -\log \frac{\exp(z_y + \tau \log \pi_y)}{\sum_c \exp(z_c + \tau \log \pi_c)}

    The logits z themselves, without the shares, are deployed: with tau 1 their softmax is the classifier for equally
    frequent classes. So a rare class needs a larger margin in training. In eval mode the loss is plain cross-entropy of
    the logits, so that ``val/loss`` and ``test/loss`` compare with other runs.

    Modules count the shares of the labels that training may see at the start of a fit.
    :func:`kd_lightning.features.adjust_head` makes the same correction after a training with plain cross-entropy.

    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), https://arxiv.org/abs/2007.07314,
    equation 10.

    Args:
        tau: Strength of the adjustment, finite and at least 0. 0 means cross-entropy.
        priors: pi: shares or numbers of labels of each class, above 0; they are scaled to sum 1. Default: None, which
            means that a fit counts the labels.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range; if there are no priors in training, or of another number of classes;
            if shapes or labels do not fit. In a fit, if a class has no label.

    >>> import torch
    >>> loss = LogitAdjustmentLoss(priors=[3, 1])
    >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).exp().item(), 3)  # one over the share of class 1
    4.0
    """

    def __init__(self, tau: float = 1.0, priors: Sequence[float] | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_weight("tau", tau)
        check_reduction(reduction)
        self.tau = float(tau)
        self.counts_labels = priors is None
        # No buffer: it would be rounded with a network in bfloat16. float32, since some devices have no float64.
        self.log_priors = None if priors is None else log_priors(priors).float()
        self.reduction = reduction

    def count_labels(self, counts: Tensor) -> None:
        """Take the number of labels of each class, (C,), as the priors. Called at the start of a fit without priors."""
        self.log_priors = log_priors(counts.tolist()).float()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = log_probabilities(logits, target)
        if self.training:
            if self.log_priors is None:
                raise InputError("LogitAdjustmentLoss: a fit counts the labels; set priors to train without one")
            if len(self.log_priors) != log_p.shape[1]:
                counted, classes = len(self.log_priors), log_p.shape[1]
                if self.counts_labels:
                    raise InputError(f"LogitAdjustmentLoss counted labels of {counted} classes, got {classes} logits")
                raise InputError(f"priors must hold {classes} classes, as the logits, got {counted}")
            self.log_priors = self.log_priors.to(log_p.device)
            log_p = (log_p + self.tau * self.log_priors.to(log_p.dtype)).log_softmax(dim=1)
        return reduce_rows(-gather_target(log_p, target), self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"tau={self.tau}, reduction={self.reduction!r}"


def log_priors(priors: Sequence[float]) -> Tensor:
    """Return the logarithms of the classes' shares, (C,) float64, which sum to 1.

    Args:
        priors: Shares or numbers of each class.

    Raises:
        InputError: Unless they are finite numbers above 0.
    """
    values = [*map(float, priors)]
    if len(values) < 2 or not all(0.0 < value < math.inf for value in values):
        raise InputError(f"priors must be finite numbers above 0, one for each of at least 2 classes, got {values}")
    counts = torch.tensor(values, dtype=torch.float64)
    return (counts / counts.sum()).log()
