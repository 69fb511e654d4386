"""Changes of colour, sharpness and blur of batches, against torchvision's functions on the same parameters."""

import re
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.transforms import Draws
from kd_lightning.data.transforms.color import ColorJitter, GaussianBlur, RandomGrayscale, gaussian_blur

TRANSFORMS = [
    ColorJitter(0.4, 0.4, 0.4, 0.1),
    ColorJitter(hue=0.5),
    ColorJitter(contrast=(0.5, 3)),
    RandomGrayscale(0.5),
    GaussianBlur((5, 3)),
]


def rows(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, index % 3)


def noise(*shape, dtype=torch.uint8):
    """Noise. The first image is grey, the second dark, the third black, the fourth white."""
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images[0] = images[0, :1]
    for number, image in enumerate(images[1:4]):
        image.copy_([image // 32, 0 * image, 0 * image + 255][number])
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def by_torchvision(name, images, factor):
    adjust = getattr(v2.functional, f"adjust_{name}")
    return torch.stack([adjust(image, value) for image, value in zip(images, factor.tolist(), strict=True)])


class TestColorJitter:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_orders(self, channels):
        """Each image has the operations in one of the 24 orders. All orders are equally likely."""
        adjust = {"brightness": 1.7, "contrast": 0.6, "saturation": 1.8, "hue": 0.23}
        image, count = noise(5, channels, 6, 7)[4:] // 2 + 40, 4800
        made = ColorJitter(**{name: (value, value) for name, value in adjust.items()})(
            image.expand(count, -1, -1, -1), rows(count)
        )
        expected = {}
        for order in permutations(adjust):
            result = image
            for name in order:
                result = by_torchvision(name, result, torch.tensor([adjust[name]], dtype=torch.float64))
            expected.setdefault(result.numpy().tobytes(), []).append(order)
        assert len(expected) >= (2 if channels == 1 else 6)
        counts = dict.fromkeys(expected, 0)
        for result in made.numpy():
            counts[result.tobytes()] += 1  # KeyError: no order gives this image
        shares = [len(orders) / 24 * count for orders in expected.values()]
        assert stats.chisquare([*counts.values()], shares).pvalue > 0.001

    @pytest.mark.parametrize("given", [0.4, 1.5, (0.2, 0.7), [2, 2]])
    def test_factors_as_torchvision(self, given):
        """The brightness of a plain image is the factor."""
        image, count = torch.full((1, 1, 1, 1), 0.01), 5000
        ours = ColorJitter(brightness=given)(image.expand(count, -1, -1, -1), rows(count)).flatten() * 100
        torch.manual_seed(0)
        theirs = torch.stack([v2.ColorJitter(brightness=given)(image) for _ in range(count)]).flatten() * 100
        if given == [2, 2]:
            assert ours.unique().tolist() == theirs.unique().tolist()
        else:
            assert stats.ks_2samp(ours, theirs).pvalue > 0.001

    def test_hue_as_torchvision(self):
        image, count = torch.tensor([0.5, 0.4, 0.1]).view(1, 3, 1, 1), 2000
        ours = ColorJitter(hue=0.4)(image.expand(count, -1, -1, -1), rows(count)).flatten(1)
        torch.manual_seed(0)
        jitter = v2.ColorJitter(hue=0.4)
        theirs = torch.cat([jitter(image) for _ in range(count)]).flatten(1)
        for channel in range(3):
            assert stats.ks_2samp(ours[:, channel], theirs[:, channel]).pvalue > 0.001

    def test_factors_are_independent(self):
        images = torch.tensor([0.3, 0.4, 0.5]).view(1, 3, 1, 1).expand(5000, -1, -1, -1)
        made = ColorJitter(brightness=0.5, saturation=0.5)(images, rows(5000)).flatten(1)
        spread = (made[:, 2] - made[:, 0]) / made.mean(1)  # the factor of saturation; brightness changes the mean
        assert abs(stats.spearmanr(spread, made.mean(1)).statistic) < 0.05

    @pytest.mark.parametrize("jitter", [ColorJitter(), ColorJitter(0, (1, 1), 0, (0, 0))])
    def test_no_change(self, jitter):
        images = noise(9, 3, 4, 4)
        assert torch.equal(jitter(images, rows(9)), images)

    @pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
    @pytest.mark.parametrize("value", [-0.1, (0.5, 0.4), (-0.6, 0), (1, 2, 3), float("nan"), float("inf")])
    def test_out_of_range(self, name, value):
        message = f"{name} must be a number from 0, or the lowest and the highest from 0, got {value}"
        with pytest.raises(InputError, match=re.escape(message)):
            ColorJitter(**{name: value})

    @pytest.mark.parametrize("value", [-0.1, 0.6, (0.2, 0.1), (-0.6, 0), (1, 2, 3), float("nan"), float("inf")])
    def test_hue_out_of_range(self, value):
        message = f"hue must be a number from 0 to 0.5, or the lowest and the highest from -0.5 to 0.5, got {value}"
        with pytest.raises(InputError, match=re.escape(message)):
            ColorJitter(hue=value)

    def test_other_images(self):
        with pytest.raises(InputError, match="images must have 1 or 3 channels .* got 2 channels of torch.uint8"):
            ColorJitter()(noise(4, 2, 5, 5), rows(4))


class TestRandomGrayscale:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    def test_as_torchvision(self, dtype):
        images = noise(200, 3, 7, 9, dtype=dtype)
        made = RandomGrayscale(0.3)(images, rows(200))
        gray = torch.stack([v2.functional.rgb_to_grayscale(image, 3) for image in images])
        is_gray = torch.tensor([torch.equal(*pair) for pair in zip(made, gray, strict=True)])
        assert torch.equal(made, torch.where(is_gray.view(-1, 1, 1, 1), gray, images))
        assert 35 < is_gray.sum() < 85

    @pytest.mark.parametrize("p", [0, 1])
    def test_limits(self, p):
        images = noise(20, 3, 7, 9)
        made = RandomGrayscale(p)(images, rows(20))
        assert torch.equal(made, v2.functional.rgb_to_grayscale(images, 3) if p else images)
        assert torch.equal(RandomGrayscale(p)(images[:, :1], rows(20)), images[:, :1])

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
    def test_out_of_range(self, p):
        with pytest.raises(InputError, match=f"p must be 0 to 1, got {p}"):
            RandomGrayscale(p)


class TestGaussianBlur:
    @pytest.mark.parametrize("shape", [(40, 3, 13, 17), (40, 1, 8, 8), (5, 2, 6, 4), (6, 3, 200, 224)])
    @pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 3), (7, 11)])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    def test_as_torchvision(self, shape, size, dtype):
        images, sigma = noise(*shape, dtype=dtype), torch.linspace(0.1, 3, shape[0]).double()
        before = images.clone()
        made = gaussian_blur(images, sigma, kernel_size=size)
        expected = torch.stack(
            [
                v2.functional.gaussian_blur(image.double(), [*size], [value, value])
                for image, value in zip(images, sigma.tolist(), strict=True)
            ]
        )
        assert made.dtype == dtype
        if dtype == torch.uint8:
            assert ((made - expected).abs() <= 0.5 + 1e-4).all()
        else:
            torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(images, before)

    def test_sigma_as_torchvision(self):
        image, count = torch.zeros(1, 1, 5, 5), 5000
        image[..., 2, 2] = 1
        ours = GaussianBlur(5, (0.3, 2))(image.expand(count, -1, -1, -1), rows(count))[:, 0, 2, 2]
        torch.manual_seed(0)
        blur = v2.GaussianBlur(5, (0.3, 2))
        theirs = torch.cat([blur(image) for _ in range(count)])[:, 0, 2, 2]
        assert stats.ks_2samp(ours, theirs).pvalue > 0.001

    def test_one_sigma(self):
        images = noise(5, 3, 9, 9, dtype=torch.float32)
        expected = v2.functional.gaussian_blur(images, [3, 3], [0.8, 0.8])
        torch.testing.assert_close(GaussianBlur(3, 0.8)(images, rows(5)), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [0, 2, (3, 4), (3, 3, 3), 3.0, -1])
    def test_other_size(self, size):
        with pytest.raises(InputError, match="kernel_size must be an odd number above 0, or two, got"):
            GaussianBlur(size)

    @pytest.mark.parametrize("sigma", [0, (0, 1), (2, 1), (1, 2, 3), float("inf"), float("nan")])
    def test_other_sigma(self, sigma):
        with pytest.raises(InputError, match="sigma must be a number above 0, or lowest and highest such number, got"):
            GaussianBlur(3, sigma)

    def test_small_image(self):
        assert GaussianBlur((7, 9))(noise(5, 3, 5, 4), rows(5)).shape == (5, 3, 5, 4)
        message = r"kernel_size must be at most \[7, 9\] for images of \[5, 4\], got \(9, 9\)"
        with pytest.raises(InputError, match=message):
            GaussianBlur(9)(noise(5, 3, 5, 4), rows(5))


class TestBits:
    """An image's pixels do not depend on the batch."""

    @pytest.mark.parametrize("number", range(len(TRANSFORMS)))
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_each_batch(self, number, dtype):
        transform, images = TRANSFORMS[number], noise(65, 3, 13, 17, dtype=dtype)
        expected = transform(images, rows(65))
        for size in (1, 2, 7, 64):
            parts = [transform(images[part], rows(65).select(part)) for part in torch.arange(65).split(size)]
            assert torch.equal(torch.cat(parts), expected), size
        order = torch.randperm(65, generator=torch.Generator().manual_seed(3))
        assert torch.equal(transform(images[order], rows(65).select(order)), expected[order])

    @pytest.mark.parametrize("number", range(len(TRANSFORMS)))
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_each_thread_count(self, number, dtype):
        images, threads = noise(12, 3, 101, 97, dtype=dtype), torch.get_num_threads()
        made = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                made.append(TRANSFORMS[number](images, rows(12)))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*made)

    @pytest.mark.parametrize("number", range(len(TRANSFORMS)))
    def test_channels_last(self, number):
        images = noise(30, 3, 13, 17)
        made = TRANSFORMS[number](images.contiguous(memory_format=torch.channels_last), rows(30))
        assert torch.equal(made, TRANSFORMS[number](images, rows(30)))

    @pytest.mark.parametrize("number", range(len(TRANSFORMS)))
    def test_input_stays(self, number):
        for images in (noise(30, 3, 13, 17), noise(30, 1, 13, 17, dtype=torch.float32)):
            before = images.clone()
            TRANSFORMS[number](images, rows(30))
            assert torch.equal(images, before)


@pytest.mark.parametrize("number", range(len(TRANSFORMS)))
def test_no_rows(number):
    assert TRANSFORMS[number](torch.zeros(0, 3, 8, 8, dtype=torch.uint8), rows(0)).shape == (0, 3, 8, 8)


def test_one_picture():
    """A PIL image, with torch's global generator."""
    picture = Image.fromarray(noise(1, 3, 9, 8)[0].permute(1, 2, 0).numpy().astype(np.uint8))
    torch.manual_seed(0)
    made = [ColorJitter(0.4, 0.4, 0.4, 0.1)(picture) for _ in range(2)]
    assert made[0].shape == (3, 9, 8)
    assert made[0].dtype == torch.uint8
    assert not torch.equal(*made)
