"""Samples by index: the training part, then the other images of the pool."""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

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


@pytest.mark.parametrize("pool", ["source", "test", "rest"])
def test_hashes_name_what_a_fit_may_use(pool):
    """Test images count where they are the unlabeled pool."""

    def hashes(test):
        train = Part(TensorDataset(torch.zeros(2, 1)), torch.tensor([0, 1]))
        parts = Parts(train, Part(test, train.targets), TensorDataset(torch.ones(1, 1)))
        return Samples(parts, pool, "Mine").hashes

    before, after = (hashes(TensorDataset(torch.full((2, 1), value))) for value in (1.0, 2.0))
    assert before["samples"] == after["samples"]
    assert (before == after) == (pool != "test")
