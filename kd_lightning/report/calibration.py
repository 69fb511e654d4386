"""How far the confidence of a network is its share of right decisions."""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 15  # as in the metric calibration_error


def reliability_bins(probabilities: Tensor, labels: Tensor) -> tuple[list[tuple[float, float, int]], float]:
    """Return the bins of a reliability diagram, and the expected calibration error.

    Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599: 15 bins of equal width.

    Args:
        probabilities: (N, C).
        labels: (N,) classes.

    Returns:
        Mean confidence, share of right decisions and number of samples of each bin that is not empty; and the sum over
        bins of |share - mean confidence|, weighted by their shares of the samples.

    >>> reliability_bins(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
    ([(0.5, 0.0, 1), (0.75, 1.0, 1)], 0.375)
    """
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    number = torch.bucketize(confidence, torch.linspace(0, 1, _BINS + 1, dtype=confidence.dtype), right=True)
    bins, error = [], 0.0
    for one in range(1, _BINS + 2):  # a confidence of 1 has a bin of its own
        inside = number == one
        count = int(inside.sum())
        if count:
            mean, share = float(confidence[inside].mean()), float(right[inside].mean())
            bins.append((mean, share, count))
            error += abs(share - mean) * count / len(labels)
    return bins, error
