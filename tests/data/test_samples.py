"""Samples by index: the training part, then the other images of the pool."""

import math

import pytest
import torch

from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.source import Part, Parts

IMAGES = [torch.rand(2)] * 2


@pytest.mark.parametrize("pool", ["source", "test"])
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0, -100], [1, -100], [0, -100, 1, -100]),
        ([0.0, 1.0], [math.nan, 1.0], [0, 1, math.nan, 1]),
        ([[0, 1], [1, 1]], [[math.nan, 1.0], [0.0, 0.0]], [[0, 1], [1, 1], [math.nan, 1], [0, 0]]),
    ],
)
def test_unknown_labels_are_unknown(pool, train, test, expected):
    """In floats, an unknown label is NaN, and -100 would count as one."""
    parts = Parts(Part(IMAGES, torch.tensor(train)), Part(IMAGES, torch.tensor(test)), IMAGES)
    found = Samples(parts, pool, "Mine").hidden_truth(torch.arange(4)).double()
    wanted = torch.tensor(expected).double()
    if pool == "source":
        wanted[2:] = -100 if wanted.ndim == 1 and isinstance(train[0], int) else math.nan
    torch.testing.assert_close(found, wanted, equal_nan=True)
