"""Random numbers of views that depend on (seed, index, view) alone: a counter-based generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_MASK = 2**64 - 1

Integers = np.ndarray[Any, np.dtype[np.uint64]]


class Draws:
    """Random numbers of the rows of a batch, keyed by (seed, index, view, stream, number of the draw).

    Row b has the same numbers in each batch, in each order and on each device. They are computed on the CPU by
    splitmix64 (Steele, Lea, Flood 2014), with one mix for each part of the key. Each method makes one draw, or as many
    as ``shape`` has entries, for all rows alike: a transform must make the same draws for each row, used or not.

    Args:
        seed: Seed of the augmentation.
        index: (B,) integers, the sample of each row.
        view: (B,) integers, the view of each row.
        device: Device of the tensors that are returned.

    Attributes:
        device: Device of the tensors that are returned.
    """

    def __init__(self, seed: int, index: Tensor, view: Tensor, device: torch.device | str = "cpu") -> None:
        key = _mix(np.full(len(index), seed & _MASK, np.uint64))
        for part in (index, view):
            key = _mix(key ^ part.cpu().numpy().astype(np.int64).view(np.uint64))
        self._start(key, device)

    def _start(self, key: Integers, device: torch.device | str) -> None:
        self._key = key
        self._drawn = 0
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self._key)

    @property
    def drawn(self) -> int:
        """Number of random numbers of each row that are used up. The next draw starts there."""
        return self._drawn

    def stream(self, number: int) -> Draws:
        """Return an independent stream of the same rows, as for each part of a chain. It makes no draw."""
        other = object.__new__(Draws)
        other._start(_mix(self._key ^ np.uint64(~number & _MASK)), self.device)
        return other

    def select(self, rows: Tensor) -> Draws:
        """Return the draws of some rows, given by a boolean tensor (B,) or by their numbers. It makes no draw."""
        other = object.__new__(Draws)
        other._start(self._key[rows.cpu().numpy()], self.device)
        other._drawn = self._drawn
        return other

    def copy(self) -> Draws:
        """Return the same draws once more, from the next one on."""
        return self.select(torch.arange(len(self)))

    def on_cpu(self) -> Draws:
        """Return stream 0, with tensors on the CPU, so that a choice of rows does not wait for an accelerator."""
        other = self.stream(0)
        other.device = torch.device("cpu")
        return other

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Tensor:
        """Return uniform numbers of [low, high), (B, ...) in float64."""
        unit = (self._bits(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return self._tensor(low + (high - low) * unit)

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Return normally distributed numbers of mean 0 and variance 1, (B, ...) in float64 (Box and Muller 1958)."""
        radius, turn = self.uniform(shape=(2, *shape)).unbind(dim=1)
        return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * turn).cos()

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Return whole numbers from ``low`` up to and including ``high`` (at most 2^32 of them), (B, ...) int64."""
        upper = self._bits(shape) >> np.uint64(32)
        return self._tensor(low + ((upper * np.uint64(high - low + 1)) >> np.uint64(32)).astype(np.int64))

    def coin(self, p: float) -> Tensor:
        """Return True with probability ``p``, (B,) booleans."""
        return self.uniform() < p

    def permutation(self, count: int) -> Tensor:
        """Return a random order of ``count`` things for each row, (B, count) int64."""
        return self._tensor(np.argsort(self._bits((count,)), axis=1, kind="stable"))

    def _bits(self, shape: Sequence[int]) -> Integers:
        """Return 64 random bits for each entry, (B, ...)."""
        count = math.prod(shape)
        counters = np.arange(self._drawn + 1, self._drawn + 1 + count, dtype=np.uint64)
        self._drawn += count
        with np.errstate(over="ignore"):
            return _mix(self._key[:, None] + counters * _STEP).reshape(len(self), *shape)

    def _tensor(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _mix(bits: Integers) -> Integers:
    """splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        bits = bits + _STEP
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))
