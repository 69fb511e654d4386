"""Weights of several teachers, and choices by them."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kd_lightning.errors import InputError


def normalised(weights: Sequence[float] | None, count: int) -> Tensor:
    """Return K numbers as float64, scaled to sum 1; equal ones for None.

    Raises:
        InputError: Unless they are K finite numbers, at least 0 and not all 0.
    """
    try:
        numbers = torch.ones(count) if weights is None else torch.tensor([*weights])
    except (TypeError, ValueError) as error:
        raise InputError(f"teacher_weights must be a list of numbers, got {weights!r}") from error
    numbers = numbers.double()
    if numbers.shape != (count,):
        raise InputError(f"teacher_weights must be {count} numbers, one for each teacher, got {[*(weights or [])]}")
    if not numbers.isfinite().all() or numbers.min() < 0 or not 0 < numbers.sum() < torch.inf:
        raise InputError(f"teacher_weights must be finite, at least 0 and not all 0, got {weights}")
    return numbers / numbers.sum()


def weighted_choice(key: Sequence[int], weights: Sequence[float]) -> int:
    """Sample a number below K. The same key gives the same number on every machine.

    Args:
        key: Integers, such as seed and step.
        weights: K probabilities of sum 1.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    bounds = list(accumulate(weights))
    number = bisect_right(bounds, int.from_bytes(digest, "little") / 2**64 * bounds[-1])
    return min(number, max(k for k, weight in enumerate(weights) if weight > 0))
