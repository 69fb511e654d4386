"""Padding of batches, as torchvision's function."""

import pytest
import torch
from torchvision.transforms import v2

from kd_lightning.data.transforms.padding import pad


@pytest.mark.parametrize("padding_mode", ["edge", "reflect", "symmetric", "constant"])
@pytest.mark.parametrize("padding", [[3, 4, 0, 5], [0, 0, 6, 0], [5, 5, 5, 5]])
def test_pad(padding_mode, padding):
    images = torch.randint(0, 256, (3, 3, 6, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    fill = [1, 2, 3] if padding_mode == "constant" else 0
    expected = v2.functional.pad(images, padding, fill, padding_mode)
    assert torch.equal(pad(images, padding, fill, padding_mode), expected)
