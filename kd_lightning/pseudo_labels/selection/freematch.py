"""Thresholds that follow the network's confidence, and a term for fairness between classes (FreeMatch)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import check_weight
from kd_lightning.pseudo_labels.selection.base import Selection, known_classes, most_probable
from kd_lightning.pseudo_labels.selection.running_mean import RunningMean, mean_of_rows
from kd_lightning.ranks import sum_over_ranks, world_size


class FreeMatch(Selection):
    r"""Accept a class from a threshold on that needs no tuning.

    Three running means over the unlabeled rows start at 1/C: :math:`\tau` of the highest probability,
    :math:`\tilde{p}` of the probabilities, and :math:`\tilde{h}` of the predicted classes. The threshold of class c is

    .. math:: \tau_c = \tau \frac{\tilde{p}_c}{\max_k \tilde{p}_k}

    The regularizer lets the student predict all classes: with the mean :math:`\bar{p}` of the student's probabilities,
    and the shares :math:`\bar{h}` of its classes, over the accepted rows of the strong view,

    .. math:: w \sum_c a_c \log b_c, \qquad a = \mathrm{norm}(\tilde{p} / \tilde{h}), \qquad
              b = \mathrm{norm}(\bar{p} / \bar{h})

    where norm scales the sum to 1. As in the authors' code, 1e-12 is added in the logarithm, a quotient by 0 counts as
    0, and the term is 0 in a step without accepted rows.

    In ``PseudoLabelRefresh`` a step is a whole round: set ``momentum`` to 0, or near it.

    Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", 2023,
    https://arxiv.org/abs/2205.07246.

    Args:
        momentum: Of the running means, in [0, 1).
        fairness_weight: w, at least 0. 0 leaves the regularizer out.
    """

    def __init__(self, momentum: float = 0.999, fairness_weight: float = 0.001) -> None:
        super().__init__()
        check_weight("fairness_weight", fairness_weight)
        self.fairness_weight = fairness_weight
        self.confidence = RunningMean(momentum)
        self.probabilities = RunningMean(momentum)
        self.histogram = RunningMean(momentum)

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state, see :class:`Selection`."""
        classes = known_classes(self, num_classes)
        self.confidence.start(1 / classes)
        for mean in (self.probabilities, self.histogram):
            mean.start(1 / classes, classes)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        confidence, label, target = most_probable(probabilities)
        means, count = mean_of_rows(torch.cat([confidence.unsqueeze(1), probabilities, target], dim=1))
        classes = probabilities.shape[1]
        shares = self.probabilities.update(means[1 : classes + 1], count)
        self.histogram.update(means[classes + 1 :], count)
        thresholds = self.confidence.update(means[0], count) * shares / shares.max()
        return target, (confidence >= thresholds.to(confidence)[label]).to(confidence)

    def regularizer(self, strong_probabilities: Tensor, weight: Tensor) -> tuple[float, Tensor] | None:
        """Return the weight and the value of the fairness term, see :class:`Selection`."""
        if not self.fairness_weight:
            return None
        p, classes = strong_probabilities, strong_probabilities.shape[1]
        own = (weight.to(p).unsqueeze(1) * p).sum(dim=0)
        predicted = F.one_hot(p.detach().argmax(dim=1), classes).to(p)
        totals = sum_over_ranks(torch.stack([own, (weight.to(p).unsqueeze(1) * predicted).sum(dim=0)]))
        # the rows of other processes have no gradient here; DDP takes the mean of the processes' gradients
        mean = totals[0] + world_size() * (own - own.detach())
        expected = _normalized(self.probabilities.value, self.histogram.value).to(p)
        fairness = (expected * (_normalized(mean, totals[1]) + 1e-12).log()).sum()
        return self.fairness_weight, torch.where(totals[1].sum() > 0, fairness, 0.0 * own.sum())

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"momentum={self.confidence.momentum}, fairness_weight={self.fairness_weight}"


def _normalized(mean: Tensor, shares: Tensor) -> Tensor:
    """Return mean / shares, with 0 in place of a quotient by 0, scaled so that the sum is 1."""
    quotient = torch.where(shares > 0, mean / torch.where(shares > 0, shares, 1.0), 0.0)
    return quotient / quotient.sum().clamp_min(1e-12)
