"""Simulated label noise: transition matrices, and wrong labels sampled from them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_transition


class LabelNoise(ABC):
    """Base of simulated label noise, given by a transition matrix."""

    @abstractmethod
    def matrix(self, classes: int) -> Tensor:
        """Transition matrix T (C, C), float64: T_ij is the probability that a sample of class i is labeled j."""

    def sample(self, truth: Tensor, classes: int, seed: int) -> Tensor:
        """Sample noisy labels (N,) of true classes (N,).

        The label of a sample depends on its true class, the seed and its position alone.
        """
        chance = torch.rand(len(truth), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        labels, by_class = truth.clone(), truth.argsort(stable=True)
        ends = torch.searchsorted(truth[by_class], torch.arange(classes + 1)).tolist()
        for below, first, end in zip(self.matrix(classes).cumsum(dim=1), ends[:-1], ends[1:], strict=True):
            rows = by_class[first:end]
            # times the sum of the row, which rounding may move away from 1
            labels[rows] = torch.searchsorted(below, chance[rows] * below[-1], right=True).clamp_max(classes - 1)
        return labels


class SymmetricNoise(LabelNoise):
    """Replace a label by one of the other classes, all equally likely.

    Args:
        rate: Probability of a replacement, in [0, 1].

    Raises:
        InputError: For a rate out of range.

    >>> SymmetricNoise(0.4).matrix(3)[0].tolist()
    [0.6, 0.2, 0.2]
    """

    def __init__(self, rate: float) -> None:
        self.rate = _check_rate(rate)

    def matrix(self, classes: int) -> Tensor:
        """See :meth:`LabelNoise.matrix`."""
        others = self.rate / max(classes - 1, 1)
        matrix = torch.full((classes, classes), others, dtype=torch.float64)
        return matrix.fill_diagonal_(1 - self.rate)


class PairNoise(LabelNoise):
    """Replace a label by the next class; the class after the last is the first.

    Args:
        rate: Probability of a replacement, in [0, 1].

    Raises:
        InputError: For a rate out of range.
    """

    def __init__(self, rate: float) -> None:
        self.rate = _check_rate(rate)

    def matrix(self, classes: int) -> Tensor:
        """See :meth:`LabelNoise.matrix`."""
        stays = torch.eye(classes, dtype=torch.float64)
        return (1 - self.rate) * stays + self.rate * stays.roll(1, dims=1)


class TransitionNoise(LabelNoise):
    """Replace labels by a transition matrix of your own.

    Args:
        transition: T: C rows of C probabilities; each row sums to 1.

    Raises:
        InputError: For a matrix that is not square, or a row that is not a distribution. The message names the row.
    """

    def __init__(self, transition: list[list[float]]) -> None:
        self.transition = check_transition(transition, "transition")

    def matrix(self, classes: int) -> Tensor:
        """See :meth:`LabelNoise.matrix`."""
        if len(self.transition) != classes:
            raise InputError(f"transition must have one row per class, {classes}, got {len(self.transition)}")
        return self.transition


def _check_rate(rate: float) -> float:
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"rate must lie in [0, 1], got {rate}")
    return float(rate)
