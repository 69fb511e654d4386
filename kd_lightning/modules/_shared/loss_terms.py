"""The terms of an objective, and their sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerm(NamedTuple):
    """One term of the objective, ``weight * value``. The logged value is unweighted."""

    weight: float
    value: Tensor


class SampleTerm(LossTerm):
    """A term that is a mean over samples, also where rows are positions of dense outputs."""


def weighted_sum(terms: dict[str, LossTerm]) -> Tensor:
    """Return the sum of weight * value, a scalar."""
    (first_weight, first), *others = terms.values()
    loss = first.sum() if first.ndim else first
    loss = loss if first_weight == 1.0 else first_weight * loss
    for weight, value in others:
        loss = torch.add(loss, value.sum() if value.ndim else value, alpha=weight)
    return loss
