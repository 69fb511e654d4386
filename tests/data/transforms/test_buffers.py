"""Memory for batches is laid out as PyTorch lays it out."""

import pytest
import torch

from kd_lightning.data.transforms.buffers import empty_batch, empty_like

LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a crop": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 0)).narrow(3, 3, x.shape[3]).narrow(2, 1, x.shape[2]),
    "expanded": lambda x: x[:1].expand_as(x),
    "turned": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_as_pytorch_lays_it_out(layout, dtype):
    """Large tensors, which NumPy allocates. No two pixels share memory."""
    images = LAYOUTS[layout](torch.arange(4 * 3 * 600 * 700).view(4, 3, 600, 700).to(torch.uint8))
    made, wanted = empty_like(images, dtype), torch.empty_like(images, dtype=dtype)
    assert (made.shape, made.dtype, made.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert made.copy_(images).equal(wanted.copy_(images))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 4, 4), (2**20,), (2**20 - 1,)])
def test_any_size(shape):
    made = empty_like(torch.zeros(shape))
    assert (made.shape, made.dtype) == (shape, torch.float32)
    assert made.fill_(3).sum() == 3 * made.numel()


@pytest.mark.parametrize("count", [0, 2, 400])
def test_a_batch_of_images_is_contiguous(count):
    """The layout of one image is not that of the batch."""
    image = torch.zeros(70, 60, 3, dtype=torch.int16).permute(2, 0, 1)
    made = empty_batch(count, image)
    assert (made.shape, made.dtype) == ((count, 3, 70, 60), torch.int16)
    assert made.is_contiguous()
    assert made.fill_(3).sum() == 3 * made.numel()
