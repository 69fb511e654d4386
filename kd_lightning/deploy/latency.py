"""Measure how long a network takes for one sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kd_lightning.inputs import Inputs

_WARM_UP, _LEAST, _MOST, _SECONDS = 5, 20, 1000, 1.0


class Latency(NamedTuple):
    """Milliseconds of a call.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float


@torch.no_grad()
def measure_latency(network: Callable[[Any], Any], x: Inputs) -> Latency:
    """Measure calls of a network on the CPU: of a second, at least 20 and at most 1000, after a warm-up.

    Args:
        network: Any function of inputs.
        x: The inputs, such as those of one sample.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _WARM_UP + _LEAST or (len(times) < _MOST and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        network(x)
        times.append(1000 * (time.perf_counter() - start))
    low, median, high = statistics.quantiles(times[_WARM_UP:], n=4)
    return Latency(median, low, high)
