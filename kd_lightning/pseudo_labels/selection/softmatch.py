"""Weights in place of a threshold (SoftMatch)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.base import check_temperature
from kd_lightning.pseudo_labels.selection.alignment import Alignment
from kd_lightning.pseudo_labels.selection.base import Selection, known_classes, most_probable
from kd_lightning.pseudo_labels.selection.running_mean import RunningMean, mean_of_rows


class SoftMatch(Selection):
    r"""Accept all pseudo-labels, and weight them by a Gaussian that is cut off above its mean.

    .. math:: \lambda = \exp\left(-\frac{\min(\max_c p_c - \mu, 0)^2}{2 \sigma^2 / n^2}\right)

    with running means of the mean (from 1/C on) and of the unbiased variance (from 1 on) of the highest probabilities.
    These probabilities are aligned with equal shares of the classes first, see :class:`DistributionAlignment`; the
    target is the class of the unaligned ones.

    In ``PseudoLabelRefresh`` a step is a whole round: set ``momentum`` to 0, or near it.

    Chen et al., "SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning", 2023,
    https://arxiv.org/abs/2301.10921. Equation and default of n are those of the authors' code.

    Args:
        n_sigma: n, above 0. A larger one weights unsure rows less.
        momentum: Of the running means, in [0, 1).
        align: Whether the probabilities are aligned for the weight, as is right if the pool has equally many samples of
            each class.
    """

    def __init__(self, n_sigma: float = 2.0, momentum: float = 0.999, align: bool = True) -> None:
        super().__init__()
        check_temperature(n_sigma, "n_sigma")
        self.n_sigma = n_sigma
        self.mean = RunningMean(momentum)
        self.variance = RunningMean(momentum)
        self.alignment = Alignment("uniform", momentum) if align else None

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state, see :class:`Selection`."""
        classes = known_classes(self, num_classes)
        self.mean.start(1 / classes)
        self.variance.start(1.0)
        if self.alignment is not None:
            self.alignment.start(classes)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        _, _, target = most_probable(probabilities)
        aligned = probabilities if self.alignment is None else self.alignment(probabilities, labeled_probabilities)
        confidence = aligned.amax(dim=1)
        mean, count = mean_of_rows(confidence)
        spread, _ = mean_of_rows((confidence - mean) ** 2)
        # one row has no variance
        variance = self.variance.update(spread * count / (count - 1).clamp_min(1.0), count - 1)
        distance = (confidence - self.mean.update(mean, count)).clamp_max(0.0)
        return target, torch.exp(-(distance**2) / (2 * variance / self.n_sigma**2).clamp_min(1e-12)).to(confidence)

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"n_sigma={self.n_sigma}, momentum={self.mean.momentum}, align={self.alignment is not None}"
