"""Random numbers of views: their key, their distribution, and that they do not depend on the batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from kd_lightning.data.transforms import Draws

MASK = 2**64 - 1


def splitmix(key):
    """The finaliser of splitmix64, with Python's whole numbers."""
    key = (key + 0x9E3779B97F4A7C15) & MASK
    key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) & MASK
    key = ((key ^ key >> 27) * 0x94D049BB133111EB) & MASK
    return key ^ key >> 31


def draws(seed=0, size=64, view=0):
    index = torch.arange(size)
    return Draws(seed, index, torch.full_like(index, view))


def test_reference_by_hand():
    index, view = torch.tensor([0, 5, 2**40, -1]), torch.tensor([0, 3, 7, 2])
    made = Draws(-9, index, view).stream(4)
    found = torch.stack([made.uniform(), made.uniform()])
    for row, (i, v) in enumerate(zip(index.tolist(), view.tolist(), strict=True)):
        key = splitmix(splitmix(splitmix(-9 & MASK) ^ i & MASK) ^ v & MASK)
        key = splitmix(key ^ ~4 & MASK)
        for number in range(2):
            bits = splitmix((key + (number + 1) * 0x9E3779B97F4A7C15) & MASK)
            assert found[number, row].item() == (bits >> 11) / 2**53


def test_first_outputs_of_splitmix64():
    """The published sequence of seed 1234567."""
    made = draws(size=1)
    made._key = np.array([1234567 - 0x9E3779B97F4A7C15 & MASK], dtype=np.uint64)
    assert made._bits((3,))[0].tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5)])
def test_rows_do_not_depend_on_the_batch(shape):
    whole = draws()
    expected = whole.uniform(-1, 2, shape), whole.integers(3, 9, shape), whole.coin(0.3), whole.permutation(4)
    order = torch.randperm(64)
    for rows in (torch.arange(64)[:1], torch.arange(64)[5:12], order, torch.cat([order, order])):
        some = Draws(0, rows, torch.zeros_like(rows))
        found = some.uniform(-1, 2, shape), some.integers(3, 9, shape), some.coin(0.3), some.permutation(4)
        assert all(torch.equal(one, all_rows[rows]) for one, all_rows in zip(found, expected, strict=True))
        picked = draws().stream(2).select(rows)
        assert torch.equal(picked.uniform(), draws().stream(2).uniform()[rows])


def test_select_after_a_draw():
    one, other = draws(), draws()
    first = one.uniform()
    assert torch.equal(other.uniform()[::2], first[::2])
    assert torch.equal(one.select(torch.arange(0, 64, 2)).uniform(), other.uniform()[::2])
    assert torch.equal(draws().select(torch.arange(64) < 3).uniform(), draws().uniform()[:3])


def test_each_part_of_the_key_counts():
    made = [draws(), draws(seed=1), draws(view=1), draws().stream(0), draws().stream(1), draws().stream(-1)]
    made += [draws().stream(0).stream(0), draws().stream(0).stream(1), draws(seed=-1), draws(seed=2**63 - 1)]
    values = torch.stack([one.uniform() for one in made]).flatten()
    assert len(values.unique()) == len(values)


def test_a_draw_of_two_is_two_draws():
    assert torch.equal(draws().uniform(shape=(2,)), torch.stack([(one := draws()).uniform(), one.uniform()], dim=1))


def test_uniform_numbers():
    """Chi-square of a million, and correlation between neighbours in each direction."""
    index, view = torch.arange(1000).repeat_interleave(100), torch.arange(100).repeat(1000)
    values = Draws(3, index, view).uniform(shape=(10,)).numpy()
    assert values.min() >= 0 and values.max() < 1
    assert stats.chisquare(np.histogram(values, bins=256, range=(0, 1))[0]).pvalue > 1e-4
    cube = values.reshape(1000, 100, 10)
    for axis in range(3):
        one, other = cube.take(range(cube.shape[axis] - 1), axis), cube.take(range(1, cube.shape[axis]), axis)
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5e-3
    assert len(np.unique(values)) > 0.999 * values.size


def test_whole_numbers_coins_and_orders():
    made = draws(size=60_000)
    assert stats.chisquare(made.integers(-2, 4).add(2).bincount(minlength=7)).pvalue > 1e-4
    assert torch.equal(made.integers(5, 5), torch.full((60_000,), 5))
    assert abs(made.coin(0.3).double().mean() - 0.3) < 0.01
    assert not made.coin(0.0).any()
    assert made.coin(1.0).all()
    orders = made.permutation(3)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(60_000, 3))
    assert stats.chisquare((orders * torch.tensor([9, 3, 1])).sum(dim=1).unique(return_counts=True)[1]).pvalue > 1e-4


def test_types_and_range():
    made = draws()
    assert made.uniform().dtype == torch.float64
    assert made.integers(0, 1).dtype == torch.int64
    assert made.uniform(2, 3).min() >= 2 and made.uniform(2, 3).max() < 3
    assert len(made) == 64 and made.device == torch.device("cpu")


def test_draws_for_the_host():
    """They are a stream of their own, the same one on each device."""
    host = Draws(0, torch.arange(64), torch.zeros(64, dtype=torch.long), "meta").on_cpu()
    assert host.device == torch.device("cpu")
    assert torch.equal(host.uniform(), draws().stream(0).uniform())


def test_a_copy_goes_on_where_the_draws_are():
    made = draws()
    made.uniform(shape=(3,))
    other = made.copy()
    assert made.drawn == other.drawn == 3
    assert torch.equal(made.uniform(), other.uniform())
    other.integers(0, 5, (2,))
    assert (made.drawn, other.drawn) == (4, 6)
