"""Random numbers of rows: by Python's whole numbers, even, and without an index."""

import numpy as np
import pytest
import torch

from kd_lightning import Batch
from kd_lightning.modules._shared.row_draws import uniform_of_rows


def splitmix(key):
    """The published generator, by Python's whole numbers."""
    key = (key + 0x9E3779B97F4A7C15) % 2**64
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) % 2**64
    return key ^ (key >> 31)


def draw(index, view):
    return (splitmix(splitmix(index % 2**64) ^ (view % 2**64)) >> 40) / 2**24


def test_numbers_of_rows():
    index, view = torch.tensor([0, 1, 5, 2**40, -1]), torch.tensor([0, 3, 0, 2**33, 7])
    found = uniform_of_rows(Batch(torch.zeros(5), None, index, view))
    assert found.tolist() == [draw(i, v) for i, v in zip(index.tolist(), view.tolist(), strict=True)]
    many = uniform_of_rows(Batch(torch.zeros(4000), None, torch.arange(4000), torch.full((4000,), 3)))
    assert np.histogram(many, 10, (0, 1))[0] == pytest.approx(np.full(10, 400), abs=80)
    next_view = uniform_of_rows(Batch(torch.zeros(4000), None, torch.arange(4000), torch.full((4000,), 4)))
    assert abs(np.corrcoef(many, next_view)[0, 1]) < 0.05


def test_without_a_view_they_come_from_the_generator():
    batch = Batch(torch.zeros(5), None, torch.arange(5))
    torch.manual_seed(1)
    found = uniform_of_rows(batch)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(5))


def test_no_value_is_read():
    rows = torch.zeros(5, dtype=torch.long, device="meta")
    assert uniform_of_rows(Batch(rows, None, rows, rows)).shape == (5,)
