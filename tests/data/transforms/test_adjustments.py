"""Changes of colour and sharpness of batches, against torchvision's functions on the same parameters."""

import pytest
import torch
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.transforms import adjustments

ADJUSTMENTS = ["brightness", "contrast", "saturation", "hue", "sharpness"]
SHAPES = [(64, 3, 13, 17), (64, 1, 8, 8), (3, 3, 224, 224), (5, 3, 3, 3), (5, 3, 2, 9), (5, 1, 1, 1)]


def noise(*shape, dtype=torch.uint8):
    """Noise. The first image is grey, the second dark, the third black, the fourth white."""
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images[0] = images[0, :1]
    for number, image in enumerate(images[1:4]):
        image.copy_([image // 32, 0 * image, 0 * image + 255][number])
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def factors(name, count):
    """Factors over the whole range, with the one that changes nothing and the lowest."""
    values = torch.linspace(-0.5, 0.5, count) if name == "hue" else torch.linspace(0, 2.5, count)
    values[-1] = 0 if name == "hue" else 1
    return values.double()[torch.randperm(count, generator=torch.Generator().manual_seed(2))]


def by_torchvision(name, images, factor):
    adjust = getattr(v2.functional, f"adjust_{name}")
    return torch.stack([adjust(image, value) for image, value in zip(images, factor.tolist(), strict=True)])


@pytest.mark.parametrize("name", ADJUSTMENTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_as_torchvision(name, shape, dtype):
    images, factor = noise(*shape, dtype=dtype), factors(name, shape[0])
    before = images.clone()
    made, expected = getattr(adjustments, f"adjust_{name}")(images, factor), by_torchvision(name, images, factor)
    assert made.dtype == dtype
    if dtype == torch.uint8 or name in ("brightness", "saturation"):
        assert torch.equal(made, expected)
    else:
        torch.testing.assert_close(made, expected, rtol=0, atol=3e-7)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_all_colors(name):
    """Colours from a grid, with those of equal channels and of extreme channels."""
    levels = torch.tensor([*range(0, 256, 7), 1, 254, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, len(levels), -1)
    factor = torch.tensor([-0.5, -1 / 3, 0, 0.2]) if name == "hue" else torch.tensor([0, 0.3, 1, 1.9])
    images = colors.expand(4, -1, -1, -1)
    assert torch.equal(
        getattr(adjustments, f"adjust_{name}")(images, factor.double()), by_torchvision(name, images, factor)
    )


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_parts_of_a_large_batch(name):
    images, factor = noise(24, 3, 128, 130), factors(name, 24)
    assert images.numel() > 3 * adjustments._PART
    assert torch.equal(getattr(adjustments, f"adjust_{name}")(images, factor), by_torchvision(name, images, factor))


def test_mean_of_a_large_image():
    """The mean is 211. A sum in float32 has not enough bits here, and gives 210.99999, which becomes 210."""
    half = noise(8, 1, 301, 997) % 45
    images = torch.cat([211 + half, 211 - half], dim=3)
    assert adjustments.adjust_contrast(images, torch.zeros(8).double()).unique().tolist() == [211]
    made = adjustments.adjust_contrast(images.double() / 255, torch.zeros(8).double())
    torch.testing.assert_close(made, torch.full_like(made, 211 / 255), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ADJUSTMENTS)
@pytest.mark.parametrize("images", [noise(4, 2, 5, 5), noise(4, 4, 5, 5), noise(4, 3, 5, 5).int()])
def test_other_images(name, images):
    with pytest.raises(InputError, match="images must have 1 or 3 channels of torch.uint8, or of floats"):
        getattr(adjustments, f"adjust_{name}")(images, torch.ones(4).double())
