"""Simulated label noise: how labels go wrong, and a seeded draw of wrong ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_transition


class LabelNoise(ABC):
    """How labels go wrong, for experiments."""

    @abstractmethod
    def matrix(self, classes: int) -> Tensor:
        """T, (C, C): T_ij is the probability that a sample of class i is labeled j."""

    def draw(self, truth: Tensor, classes: int, seed: int) -> Tensor:
        """Labels (N,) for true classes (N,); a sample's draw follows from the seed and its place alone."""
        chance = torch.rand(len(truth), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        labels, by_class = truth.clone(), truth.argsort(stable=True)
        ends = torch.searchsorted(truth[by_class], torch.arange(classes + 1)).tolist()
        for below, first, end in zip(self.matrix(classes).cumsum(dim=1), ends[:-1], ends[1:], strict=True):
            rows = by_class[first:end]
            # times the sum, which may be a little off 1
            labels[rows] = torch.searchsorted(below, chance[rows] * below[-1], right=True).clamp_max(classes - 1)
        return labels


class SymmetricNoise(LabelNoise):
    """A share of the labels is replaced by one of the other classes, all equally likely.

    Args:
        rate: The share, in [0, 1].

    Raises:
        InputError: For a rate out of range.

    >>> SymmetricNoise(0.4).matrix(3)[0].tolist()
    [0.6, 0.2, 0.2]
    """

    def __init__(self, rate: float) -> None:
        self.rate = _check_rate(rate)

    def matrix(self, classes: int) -> Tensor:
        """See :class:`LabelNoise`."""
        others = self.rate / max(classes - 1, 1)
        matrix = torch.full((classes, classes), others, dtype=torch.float64)
        return matrix.fill_diagonal_(1 - self.rate)


class PairNoise(LabelNoise):
    """A share of each class's labels is replaced by the class after it, the last one's by the first.

    Args:
        rate: The share, in [0, 1].

    Raises:
        InputError: For a rate out of range.
    """

    def __init__(self, rate: float) -> None:
        self.rate = _check_rate(rate)

    def matrix(self, classes: int) -> Tensor:
        """See :class:`LabelNoise`."""
        stays = torch.eye(classes, dtype=torch.float64)
        return (1 - self.rate) * stays + self.rate * stays.roll(1, dims=1)


class TransitionNoise(LabelNoise):
    """Labels go wrong by a matrix of your own.

    Args:
        transition: T, C rows of C probabilities that each sum to 1.

    Raises:
        InputError: For a matrix that is none; the message names the row.
    """

    def __init__(self, transition: list[list[float]]) -> None:
        self.transition = check_transition(transition, "transition")

    def matrix(self, classes: int) -> Tensor:
        """See :class:`LabelNoise`."""
        if len(self.transition) != classes:
            raise InputError(f"transition is of {len(self.transition)} classes, but the data have {classes}")
        return self.transition


def _check_rate(rate: float) -> float:
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"rate must lie in [0, 1], got {rate}")
    return float(rate)
