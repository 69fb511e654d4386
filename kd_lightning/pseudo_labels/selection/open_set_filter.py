"""A filter for pools that hold samples of unknown classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection, SelectionAround
from kd_lightning.pseudo_labels.selection.running_mean import RunningMean
from kd_lightning.ranks import sum_over_ranks

_BINS = 64


class OpenSetFilter(SelectionAround):
    r"""Leave out samples that are too unsure to be of a known class, whatever another selection accepts.

    The score is the entropy over its largest value, :math:`h = -\sum_c p_c \log p_c / \log C`, in [0, 1]. A histogram
    with 64 bins is the running mean of the scores of the steps; it starts even. Otsu's threshold splits it into two
    groups, with shares :math:`\omega` and mean bins :math:`\mu`:

    .. math:: k = \arg\max_k \omega_0(k) \, \omega_1(k) \, (\mu_0(k) - \mu_1(k))^2

    Rows in the bins up to k have the weight that the other selection gives, all others 0. The lowest k counts, if
    several give the largest value.

    It is for a pool where a good part of the samples belongs to no class of the labels, and where the network is less
    sure of these. It splits any pool, so leave it out where there are no such samples. It must be outside of
    ``DistributionAlignment``, so that it gets the probabilities as they are. In ``PseudoLabelRefresh`` a step is a
    whole round: set ``momentum`` to 0, or near it.

    Entropy is the score since a selection gets probabilities; an energy would need logits. The split is that of Otsu,
    "A Threshold Selection Method from Gray-Level Histograms", 1979, https://doi.org/10.1109/TSMC.1979.4310076, which Yu
    et al., "Multi-Task Curriculum Framework for Open-Set Semi-Supervised Learning", 2020,
    https://arxiv.org/abs/2007.11330, take for scores of a trained detector. The two together are ours, not a paper's.

    Args:
        selection: The selection that gives targets and weights. It gets all rows.
        momentum: Of the running histogram, in [0, 1).
    """

    def __init__(self, selection: Selection, momentum: float = 0.99) -> None:
        super().__init__(selection)
        self.histogram = RunningMean(momentum)

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state of both, see :class:`Selection`."""
        super().setup(num_samples, num_classes, num_unlabeled)
        self.histogram.start(1 / _BINS, _BINS)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        if not self.histogram.value.numel():
            raise InputError("OpenSetFilter has no state yet; call setup(num_samples, num_classes), as a fit does")
        target, weight = self.selection(probabilities, labeled_probabilities, index)
        score = torch.special.entr(probabilities).sum(dim=1) / math.log(max(probabilities.shape[1], 2))
        bins = (score * _BINS).long().clamp(0, _BINS - 1)
        counts = sum_over_ranks(count_bins(bins)).to(self.histogram.value)
        total = counts.sum()
        last = otsu_threshold(self.histogram.update(counts / total.clamp_min(1.0), total))
        return target, weight * (bins <= last).to(weight)

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"momentum={self.histogram.momentum}"


def count_bins(bins: Tensor) -> Tensor:
    """Return how often each bin comes, (64,) integers, of the numbers of bins (N,)."""
    # whole numbers: a sum of ones in float32 ends at 2^24, and dense outputs may have more positions
    return torch.zeros(_BINS, dtype=torch.long, device=bins.device).scatter_add(0, bins, torch.ones_like(bins))


def otsu_threshold(histogram: Tensor) -> Tensor:
    """Return the last bin of the lower group, (), by Otsu's method.

    Args:
        histogram: Shares of the bins, (K,), of sum 1, in the order of their values.
    """
    below = histogram.cumsum(0)
    place = torch.arange(len(histogram), device=histogram.device, dtype=histogram.dtype)
    moment = (histogram * place).cumsum(0)
    # (mu_0 - mu_1)^2 w_0 w_1 = (mu w_0 - m_0)^2 / (w_0 w_1), with m_0 the part of the mean mu that lies below
    product = below * (1 - below)
    between = (moment[-1] * below - moment) ** 2 / product.clamp_min(1e-12)
    return torch.where(product > 1e-12, between, 0.0).argmax()
