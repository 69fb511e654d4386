"""Confidence intervals (95 %) of shares, of their differences, and of means."""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtri, stdtrit
from torch import Tensor

Interval = tuple[float, float]
_Z = float(ndtri(0.975))


def share_interval(share: float, n: int) -> Interval:
    """Return the exact interval of a share of n decisions (Clopper and Pearson 1934); 0 to 1 without any.

    >>> low, high = share_interval(0.5, 10)
    >>> round(low, 3), round(high, 3)
    (0.187, 0.813)
    """
    right = share * n
    low = float(betaincinv(right, n - right + 1, 0.025)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, n - right, 0.975)) if right < n else 1.0
    return low, high


def difference_interval(first: float, n: int, second: float, m: int) -> Interval:
    """Return the interval of the difference of two shares of different samples, ``first - second``.

    It joins the score intervals of both (Newcombe, "Interval estimation for the difference between independent
    proportions", Statistics in Medicine 17, 1998, method 10; his 56 of 70 and 48 of 80 give 0.0524 to 0.3339).

    Args:
        first: A share, in [0, 1].
        n: Its number of samples, at least 1.
        second: The other share.
        m: Its number of samples, at least 1.

    >>> low, high = difference_interval(56 / 70, 70, 48 / 80, 80)
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)
    """
    (low_1, high_1), (low_2, high_2) = _score_interval(first, n), _score_interval(second, m)
    difference = first - second
    return (
        difference - math.hypot(first - low_1, high_2 - second),
        difference + math.hypot(high_1 - first, second - low_2),
    )


def _score_interval(share: float, n: int) -> Interval:
    """Return the score interval of a share (Wilson 1927)."""
    square = _Z**2 / n
    center = share + square / 2
    width = _Z * math.sqrt(max(share * (1 - share), 0.0) / n + square / (4 * n))
    return (center - width) / (1 + square), (center + width) / (1 + square)


def mean_interval(values: Tensor) -> Interval:
    """Return the interval of the mean of independent values (N,), by Student's t; infinite for fewer than two."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    mean, error = float(values.double().mean()), float(values.double().std()) / math.sqrt(n)
    width = error * float(stdtrit(n - 1, 0.975))
    return mean - width, mean + width
