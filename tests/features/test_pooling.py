"""Pool, against means written out."""

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.features.pooling import Pool

MAPS = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def test_means():
    expected = torch.stack([torch.stack([channel.sum() / 20 for channel in sample]) for sample in MAPS])
    torch.testing.assert_close(Pool("mean")(MAPS), expected)
    torch.testing.assert_close(Pool("mean", "last")(MAPS.permute(0, 2, 3, 1)), expected)
    vectors = torch.randn(2, 3)
    for pool in (Pool("mean"), Pool("first", "last")):
        assert pool(vectors) is vectors


def test_the_first_token():
    tokens = MAPS.flatten(2)
    assert torch.equal(Pool("first")(tokens), tokens[:, :, 0])
    assert torch.equal(Pool("first", "last")(tokens.transpose(1, 2)), tokens[:, :, 0])


def test_masked_positions_do_not_count():
    mask = torch.zeros(2, 4, 5, dtype=torch.long)
    mask[0, 1, 2] = mask[0, 3, 4] = 1  # nothing in the second sample
    changed = MAPS.masked_fill(mask[:, None] == 0, torch.nan)
    expected = torch.stack([(MAPS[0, :, 1, 2] + MAPS[0, :, 3, 4]) / 2, torch.zeros(3)])
    torch.testing.assert_close(Pool("mean")(changed, mask), expected)
    torch.testing.assert_close(Pool("mean", "last")(changed.permute(0, 2, 3, 1), mask), expected)
    assert torch.equal(Pool("mean")(MAPS, mask[:, :2]), Pool("mean")(MAPS))  # a mask of other positions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_means_of_half_precision_are_float32(dtype):
    ones = torch.full((1, 2, 40, 40), 100, dtype=dtype)  # their sum is too large for float16
    found = Pool("mean")(ones)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.tolist() == [[100, 100]]


def test_what_is_no_pool():
    with pytest.raises(InputError, match="^pool must be mean or first, got 'max'$"):
        Pool("max")
    with pytest.raises(InputError, match="pool: first needs tokens"):
        Pool("first")(MAPS)
