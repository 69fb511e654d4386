"""Resized crops, resizes and centre crops of lists and batches, to the bit as torchvision's functions."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.transforms import Compose, Draws
from kd_lightning.data.transforms.channels import RGB
from kd_lightning.data.transforms.resize import CenterCrop, RandomResizedCrop, Resize, ResizeToCover

SHAPES = [(40, 61), (64, 64), (90, 33), (31, 31), (25, 200), (7, 9)]


def draws(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, index % 3)


def noise(*shape, dtype=torch.uint8, seed=1):
    made = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


def pictures(count, channels=3, dtype=torch.uint8, *, decoded=False):
    """Images (C, H, W) of different sizes; if decoded, they lie in memory as (H, W, C)."""
    images = [noise(channels, *SHAPES[n % len(SHAPES)], dtype=dtype, seed=n) for n in range(count)]
    return [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if decoded else image for image in images]


class TestRandomResizedCrop:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("decoded", [False, True])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    @pytest.mark.parametrize("size", [24, (20, 33)])
    def test_as_torchvision(self, channels, decoded, dtype, size):
        images = pictures(30, channels, dtype, decoded=decoded)
        transform = RandomResizedCrop(size)
        made = transform(images, draws(30))
        places = transform.places([image.shape[1:] for image in images], draws(30))
        side = [size, size] if isinstance(size, int) else [*size]
        assert made.shape == (30, channels, *side) and made.dtype == dtype
        for image, new, (top, left, height, width) in zip(images, made, places.tolist(), strict=True):
            assert torch.equal(new, v2.functional.resized_crop(image, top, left, height, width, side))

    @pytest.mark.parametrize("mode", [v2.InterpolationMode.BICUBIC, v2.InterpolationMode.NEAREST])
    @pytest.mark.parametrize("antialias", [False, True])
    def test_other_modes(self, mode, antialias):
        images = pictures(12)
        transform = RandomResizedCrop(24, interpolation=mode, antialias=antialias)
        places = transform.places([image.shape[1:] for image in images], draws(12)).tolist()
        for image, new, place in zip(images, transform(images, draws(12)), places, strict=True):
            expected = v2.functional.resized_crop(image, *place, [24, 24], interpolation=mode, antialias=antialias)
            assert torch.equal(new, expected)

    @pytest.mark.parametrize("shape", [(40, 61), (90, 33), (25, 200), (300, 20), (7, 9)])
    @pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1), (3 / 4, 4 / 3)), ((0.9, 1), (1.5, 4)), ((1, 1), (1, 1))])
    def test_crops_are_distributed_as_torchvision(self, shape, scale, ratio):
        count = 2000
        ours = RandomResizedCrop(8, scale, ratio).places([shape] * count, draws(count)).numpy()
        torch.manual_seed(0)
        theirs = v2.RandomResizedCrop(8, scale, ratio)
        made = [theirs.make_params([torch.empty(1, *shape)]) for _ in range(count)]
        for column, name in enumerate(("top", "left", "height", "width")):
            wanted = np.array([one[name] for one in made])
            assert stats.ks_2samp(ours[:, column], wanted, method="asymp").pvalue > 0.0005, name
            if len({*wanted}) == 1:  # the central crop, where none fits
                assert (ours[:, column] == wanted).all()
        top, left, height, width = ours.T
        assert min(top.min(), left.min()) >= 0 and min(height.min(), width.min()) >= 1
        assert (top + height).max() <= shape[0] and (left + width).max() <= shape[1]

    def test_each_place_is_as_likely(self):
        places = RandomResizedCrop(8, (1 / 4, 1 / 4), (1, 1)).places([(8, 8)] * 5000, draws(5000))
        assert (places[:, 2:] == 4).all()
        counts = torch.bincount(places[:, 0] * 5 + places[:, 1], minlength=25)
        assert stats.chisquare(counts.numpy()).pvalue > 0.001

    def test_a_crop_has_at_least_one_pixel(self):
        """torchvision rounds the height of this central crop to 0."""
        image = noise(3, 4, 1)
        assert RandomResizedCrop((2, 40), ratio=(15, 30))([image]).shape == (1, 3, 2, 40)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "size must be at least 1, got 0"),
            ({"size": 8, "scale": (0, 1)}, "scale must be lowest and highest share, above 0 and at most 1"),
            ({"size": 8, "scale": (0.5, 1.1)}, "scale must be lowest and highest share, above 0 and at most 1"),
            ({"size": 8, "ratio": (2, 1)}, "ratio must be lowest and highest width over height, above 0"),
            ({"size": 8, "ratio": (1, math.inf)}, "ratio must be lowest and highest width over height, above 0"),
        ],
    )
    def test_bad_values(self, arguments, message):
        with pytest.raises(InputError, match=message):
            RandomResizedCrop(**arguments)


class TestEvaluation:
    @pytest.mark.parametrize("decoded", [False, True])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    @pytest.mark.parametrize("size", [16, 50, (20, 33)])
    def test_as_torchvision(self, decoded, dtype, size):
        images = pictures(12, dtype=dtype, decoded=decoded)
        side = [size] if isinstance(size, int) else [*size]
        for image, new in zip(images, Resize(size)(images), strict=True):
            assert torch.equal(new, v2.functional.resize(image, side))
        crops = CenterCrop(size)(images)
        assert crops.shape == (12, 3, *(side * 2)[:2])
        for image, new in zip(images, crops, strict=True):
            assert torch.equal(new, v2.functional.center_crop(image, side))

    @pytest.mark.parametrize("size", [(14, 21), (21, 14), (48, 48)])
    def test_smallest_size_that_covers(self, size):
        images = pictures(12)
        for image, new in zip(images, ResizeToCover(size)(images), strict=True):
            height, width = new.shape[1:]
            assert height >= size[0] and width >= size[1] and (height == size[0] or width == size[1])
            scale = max(size[0] / image.shape[1], size[1] / image.shape[2])
            assert abs(height - scale * image.shape[1]) <= 0.5 and abs(width - scale * image.shape[2]) <= 0.5
            assert torch.equal(new, v2.functional.resize(image, [height, width]))

    def test_a_batch_is_as_a_list(self):
        images = noise(5, 3, 40, 61)
        for transform in (Resize(16), Resize((20, 33)), ResizeToCover((14, 21)), CenterCrop(50), CenterCrop(16)):
            assert torch.equal(torch.stack([*transform([*images])]), transform(images))

    def test_one_image(self):
        image = noise(3, 40, 61)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for transform in (Resize(16), ResizeToCover((14, 21)), CenterCrop(16), RandomResizedCrop(9, (1, 1), (1, 1))):
            torch.manual_seed(0)
            made = transform(image)
            torch.manual_seed(0)
            assert made.ndim == 3 and torch.equal(made, transform(picture))


class TestChannels:
    @pytest.mark.parametrize("crop", [RandomResizedCrop(8), Compose([Resize(16), CenterCrop(8)])])
    def test_grey_and_colour(self, crop):
        images = pictures(4)
        images[1:3] = pictures(4, 1)[1:3]
        made = Compose([RGB(), crop])(images, draws(4))
        assert made.shape == (4, 3, 8, 8)
        assert torch.equal(made[1, 0], made[1, 1]) and torch.equal(made[1, 0], made[1, 2])
        grey = Compose([v2.Identity(), crop])(images[1].unsqueeze(0), draws(4).select(torch.tensor([1])))
        assert torch.equal(made[1:2], grey.expand(-1, 3, -1, -1))
        with pytest.raises(InputError, match=r"must have one number of channels, got \[1, 3\]; RGB makes it 3"):
            crop(images)

    def test_others_are_refused(self):
        assert torch.equal(RGB()(noise(2, 1, 4, 4)), noise(2, 1, 4, 4).expand(-1, 3, -1, -1))
        for images in (noise(2, 4, 8, 8), [noise(3, 8, 8), noise(2, 8, 8)]):
            with pytest.raises(InputError, match="images must have 1 or 3 channels, got "):
                RGB()(images)

    def test_types_are_not_mixed(self):
        with pytest.raises(InputError, match="must have one shape and type"):
            RandomResizedCrop(8)([noise(3, 9, 9), noise(3, 9, 9, dtype=torch.float32)])


ALL = [
    RandomResizedCrop(24),
    Compose([RGB(), Resize(40), CenterCrop(32)]),
    Compose([ResizeToCover((24, 40)), CenterCrop(24)]),
]


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("decoded", [False, True])
def test_a_row_does_not_depend_on_the_others(transform, dtype, decoded):
    images = pictures(65, dtype=dtype, decoded=decoded)
    expected = transform(images, draws(65))
    assert expected.is_contiguous()
    for size in (1, 2, 7, 64):
        parts = [
            transform([images[n] for n in rows.tolist()], draws(65).select(rows))
            for rows in torch.arange(65).split(size)
        ]
        assert torch.equal(torch.cat(parts), expected)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(3))
    assert torch.equal(transform([images[n] for n in order], draws(65).select(order)), expected[order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(transform(images, draws(65)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("transform", [*ALL, Resize(24), ResizeToCover((24, 30)), CenterCrop(24)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_row_of_a_tensor_does_not_depend_on_the_others(transform, dtype, layout):
    images = noise(65, 3, 45, 61, dtype=dtype).contiguous(memory_format=layout)
    expected = transform(images, draws(65))
    for size in (1, 2, 7, 64):
        parts = [transform(images[rows], draws(65).select(rows)) for rows in torch.arange(65).split(size)]
        assert torch.equal(torch.cat(parts), expected)


def test_bytes_do_not_depend_on_the_layout_in_memory():
    """A file and a store of decoded pictures give the same pixels."""
    for transform in ALL:
        assert torch.equal(transform(pictures(30), draws(30)), transform(pictures(30, decoded=True), draws(30)))


def test_use_changes_no_hash():
    for transform in ALL:
        before = fingerprint(transform)
        transform(pictures(3), draws(3))
        assert fingerprint(transform) == before
