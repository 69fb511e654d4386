"""Random numbers of rows: by Python's whole numbers, even, and without an index."""

from dataclasses import replace

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


def draw(seed, step, index, view):
    key = splitmix(splitmix(seed % 2**64) ^ step)
    return (splitmix(splitmix(key ^ (index % 2**64)) ^ (view % 2**64)) >> 40) / 2**24


def test_numbers_of_rows():
    index, view = torch.tensor([0, 1, 5, 2**40, -1]), torch.tensor([0, 3, 0, 2**33, 7])
    for seed, step in ((0, 0), (2**32 - 1, 7), (-3, 2**31)):
        found = uniform_of_rows(Batch(torch.zeros(5), None, index, view), seed, step)
        assert found.tolist() == [draw(seed, step, i, v) for i, v in zip(index.tolist(), view.tolist(), strict=True)]
    rows = Batch(torch.zeros(4000), None, torch.arange(4000), torch.full((4000,), 3))
    many = uniform_of_rows(rows, 0, 0)
    assert np.histogram(many, 10, (0, 1))[0] == pytest.approx(np.full(10, 400), abs=80)
    for seed, step, view in ((0, 0, 4), (0, 1, 3), (1, 0, 3)):
        other = uniform_of_rows(replace(rows, view=torch.full((4000,), view)), seed, step)
        assert abs(np.corrcoef(many, other)[0, 1]) < 0.05


def test_without_a_view_they_come_from_the_generator():
    batch = Batch(torch.zeros(5), None, torch.arange(5))
    torch.manual_seed(1)
    found = uniform_of_rows(batch, 0, 0)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(5))


def test_no_value_is_read():
    rows = torch.zeros(5, dtype=torch.long, device="meta")
    assert uniform_of_rows(Batch(rows, None, rows, rows), 0, 0).shape == (5,)
