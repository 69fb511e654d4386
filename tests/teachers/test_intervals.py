"""Intervals, against scipy and the figures of the papers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kd_lightning.teachers.intervals import difference_interval, mean_interval, share_interval


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (3, 7), (41, 207)])
def test_share(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="exact")
    assert share_interval(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "n", "second", "m", "expected"),
    [  # Newcombe 1998, table II, method 10
        (56, 70, 48, 80, (0.0524, 0.3339)),
        (9, 10, 3, 10, (0.1705, 0.8090)),
        (6, 7, 2, 7, (0.0582, 0.8062)),
        (5, 56, 0, 29, (-0.0381, 0.1926)),
        (0, 10, 0, 20, (-0.1611, 0.2775)),
        (10, 10, 0, 10, (0.6075, 1.0)),
    ],
)
def test_difference(first, n, second, m, expected):
    assert difference_interval(first / n, n, second / m, m) == pytest.approx(expected, abs=5e-5)
    low, high = difference_interval(second / m, m, first / n, n)
    assert (-high, -low) == pytest.approx(expected, abs=5e-5)


def test_mean():
    values = torch.randn(12, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    array = np.asarray(values)
    expected = stats.t.interval(0.95, 11, array.mean(), stats.sem(array))
    assert mean_interval(values) == pytest.approx(expected, rel=1e-12)
    assert mean_interval(torch.ones(4)) == (1.0, 1.0)
    assert mean_interval(torch.ones(1)) == (-math.inf, math.inf)
