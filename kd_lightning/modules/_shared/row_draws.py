"""A random number for each row of a batch that follows from its sample, its view and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.batch import Batch

# splitmix64 (Steele, Lea, Flood 2014), in int64, which wraps: the step, and the multipliers and shifts of the mix
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def uniform_of_rows(batch: Batch, seed: int, step: int) -> Tensor:
    """Return a number of [0, 1) for each row, (B,) float32, on the batch's device.

    A row of the same index and view has the same number in each batch of a step, on each process and device. Without an
    index or a view, the numbers come from torch's generator.

    Args:
        batch: The batch.
        seed: Seed of the run.
        step: Number of the step. It counts since a run may show the same views again and again.
    """
    if batch.index is None or batch.view is None:
        return torch.rand(len(batch), device=batch.device)
    first = _mix(_mix(torch.tensor(seed)) ^ step).item()  # in the memory of the host: nothing waits for the device
    key = _mix(_mix(batch.index.long() ^ first) ^ batch.view.long())
    return ((key >> 40) & 0xFFFFFF).float() * 2.0**-24  # exact in float32


def _mix(key: Tensor) -> Tensor:
    key = key + _STEP
    for shift, factor in _MIX:
        key = (key ^ _shift(key, shift)) * factor
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)
