"""Normalisation of batches, against torchvision's two steps."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.transforms.normalize import Normalize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a crop": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 0)).narrow(3, 3, x.shape[3]).narrow(2, 1, x.shape[2]),
    "expanded": lambda x: x[:1].expand_as(x),
    "turned": lambda x: x.mT.contiguous().mT,
}


def noise(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def by_torchvision(images, mean, std):
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_all_levels(channels):
    """Each of the 256 levels, against torchvision and against float64."""
    mean, std = torch.linspace(0.1, 0.9, channels).tolist(), torch.linspace(0.2, 0.4, channels).tolist()
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 8, 32).repeat(2, channels, 1, 1)
    made = Normalize(mean, std)(images)
    assert made.dtype == torch.float32
    assert torch.allclose(made, by_torchvision(images, mean, std), rtol=0, atol=1e-6)
    column = [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std)]
    exact = (images.double() / 255 - column[0]) / column[1]
    assert torch.allclose(made.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.bool])
def test_other_types_as_torchvision(dtype):
    """Floats in any range, and whole numbers of other types, become float32."""
    images = (torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    before = images.clone()
    made = Normalize(MEAN, STD)(images)
    assert made.dtype == torch.float32
    assert torch.equal(made, by_torchvision(images, MEAN, STD))
    assert torch.equal(images, before)


def test_one_number_for_all_channels():
    images = noise(4, 3, 5, 6)
    for x in (images, images / 255):
        assert torch.allclose(Normalize([0.5], [0.25])(x), by_torchvision(x, [0.5], [0.25]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(65, 3, 9, 7), (65, 1, 8, 8), (65, 3, 90, 70)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_does_not_depend_on_the_others(layout, shape):
    """Pixels are the same, to the bit, for each batch size, order in memory and number of threads."""
    images = LAYOUTS[layout](noise(*shape))
    before = images.clone()
    normalize = Normalize(MEAN[: shape[1]], STD[: shape[1]])
    whole = normalize(images.contiguous())
    assert torch.equal(normalize(images), whole)
    for size in (1, 2, 7, 64):
        assert torch.equal(torch.cat([normalize(part) for part in images.split(size)]), whole)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert torch.equal(normalize(images), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(images, before)
    assert normalize(images[:0]).shape == (0, *shape[1:])


def test_order_in_memory_stays():
    for images in (noise(8, 3, 400, 300), noise(2, 3, 5, 7)):  # large and small ones
        for layout in (torch.contiguous_format, torch.channels_last):
            x = images.contiguous(memory_format=layout)
            assert Normalize(MEAN, STD)(x).is_contiguous(memory_format=layout)


def test_one_image():
    image = noise(3, 6, 5)
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    normalize = Normalize(MEAN, STD)
    assert torch.equal(normalize(picture), normalize(image))
    assert torch.equal(normalize(image), normalize(image.unsqueeze(0))[0])


def test_fingerprint():
    """Cached outputs depend on mean and std."""
    first = fingerprint(Normalize([0.5], [0.25]))
    assert first == fingerprint(Normalize([0.5], [0.25]))
    assert len({first, fingerprint(Normalize([0.4], [0.25])), fingerprint(Normalize([0.5], [0.2]))}) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalize([0.5], [0.5, 0.5]), r"a finite number for each channel, got \[0.5\] and \[0.5, 0.5\]"),
        (lambda: Normalize([], []), "a finite number for each channel"),
        (lambda: Normalize([0.5], [float("nan")]), "a finite number for each channel"),
        (lambda: Normalize([0.5, 0.5], [0.5, 0.0]), r"std must not be 0, got \[0.5, 0.0\]"),
        (lambda: Normalize(MEAN, STD)(noise(2, 1, 4, 4)), "images must have 3 channels, as mean and std have, got 1"),
        (lambda: Normalize(MEAN, STD)(noise(2, 4, 4, 4) / 255), "images must have 3 channels.*got 4"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(InputError, match=message):
        make()
