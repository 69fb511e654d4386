"""Crop, flips and random affine maps of batches, against torchvision's functions on the same parameters."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.transforms import Draws
from kd_lightning.data.transforms.affine import affine
from kd_lightning.data.transforms.geometry import (
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)

NEAREST, BILINEAR = v2.InterpolationMode.NEAREST, v2.InterpolationMode.BILINEAR


def draws(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, index % 3)


def noise(*shape, dtype=torch.uint8):
    made = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


class TestRandomAffine:
    arguments = {"degrees": (-20, 40), "translate": (0.1, 0.3), "scale": (0.7, 1.4), "shear": (-5, 12, -3, 4)}

    def test_is_affine_with_its_parameters(self):
        images = noise(50, 3, 16, 24)
        transform = RandomAffine(**self.arguments, interpolation=BILINEAR)
        values = transform.parameters_of(images, draws(50))
        assert torch.equal(transform(images, draws(50)), affine(images, *values, BILINEAR, 0))
        assert len({*values[0].tolist()}) == 50

    @pytest.mark.parametrize("more", [{}, {"translate": None, "scale": None, "shear": None}, {"shear": 7}])
    def test_parameters_are_distributed_as_torchvision(self, more):
        count, shape = 4000, (1, 20, 40)
        arguments = self.arguments | more
        ours = RandomAffine(**arguments).parameters_of(torch.empty(count, *shape), draws(count))
        torch.manual_seed(0)
        theirs = v2.RandomAffine(**arguments)
        made = [theirs.make_params([torch.empty(shape)]) for _ in range(count)]
        columns = {
            "angle": (ours[0], [m["angle"] for m in made]),
            "x": (ours[1][:, 0], [m["translate"][0] for m in made]),
            "y": (ours[1][:, 1], [m["translate"][1] for m in made]),
            "scale": (ours[2], [m["scale"] for m in made]),
            "shear x": (ours[3][:, 0], [m["shear"][0] for m in made]),
            "shear y": (ours[3][:, 1], [m["shear"][1] for m in made]),
        }
        for name, (mine, wanted) in columns.items():
            assert stats.ks_2samp(mine.numpy(), np.array(wanted), method="asymp").pvalue > 0.001, name
        assert (ours[1] == ours[1].round()).all()
        assert ours[1].abs().amax(0).tolist() == ([4, 6] if arguments["translate"] else [0, 0])

    def test_parameters_do_not_depend_on_each_other(self):
        values = RandomAffine(**self.arguments).parameters_of(torch.empty(4000, 1, 50, 50), draws(4000))
        matrix = np.corrcoef(torch.cat([v.reshape(4000, -1) for v in values], 1).numpy().T)
        assert np.abs(matrix - np.eye(6)).max() < 0.06

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"degrees": -3}, "degrees must be at least 0, or lowest and highest, got -3"),
            ({"degrees": (1, 2, 3)}, "degrees must be a number, or 2 numbers"),
            ({"degrees": math.nan}, "degrees must be a number"),
            ({"degrees": 0, "translate": (0.1, 1.5)}, "translate must be two numbers from 0 to 1"),
            ({"degrees": 0, "scale": (0, 1)}, r"scale must be lowest and highest scale, above 0, got \(0, 1\)"),
            ({"degrees": 0, "shear": (1, 2, 3)}, "shear must be a number, or 2 or 4 numbers"),
            (
                {"degrees": 0, "interpolation": v2.InterpolationMode.BICUBIC},
                "interpolation must be NEAREST or BILINEAR",
            ),
        ],
    )
    def test_bad_values(self, arguments, message):
        with pytest.raises(InputError, match=message):
            RandomAffine(**arguments)

    def test_bad_fill(self):
        with pytest.raises(InputError, match=r"fill must be one number, or one for each of 1 channels, got \[1, 2\]"):
            RandomAffine(5, fill=[1, 2])(noise(2, 1, 8, 8))
        for transform in (RandomAffine(5, fill=300), RandomCrop(4, 1, fill=300)):
            with pytest.raises(InputError, match="fill of images of type uint8 must be 0 to 255, got 300"):
                transform(noise(2, 1, 8, 8))


class TestRandomCrop:
    @pytest.mark.parametrize("padding_mode", ["constant", "edge", "reflect", "symmetric"])
    @pytest.mark.parametrize("padding", [3, [2, 4], [1, 2, 3, 0], 0, None])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_is_a_part_of_the_padded_image(self, padding_mode, padding, dtype):
        images = noise(200, 2, 9, 12, dtype=dtype)
        fill = ([7, 250] if dtype == torch.uint8 else [0.25, 0.5]) if padding_mode == "constant" else 0
        made = RandomCrop((7, 10), padding, fill=fill, padding_mode=padding_mode)(images, draws(200))
        assert made.shape == (200, 2, 7, 10)
        assert made.is_contiguous() and made.dtype == dtype
        seen = set()
        for image, crop in zip(images, made, strict=True):
            padded = image if not padding else v2.functional.pad(image, padding, fill, padding_mode)
            places = {
                (top, left)
                for top in range(padded.shape[1] - 6)
                for left in range(padded.shape[2] - 9)
                if torch.equal(padded[:, top : top + 7, left : left + 10], crop)
            }
            assert places
            seen |= places
        assert len(seen) >= 0.7 * (padded.shape[1] - 6) * (padded.shape[2] - 9)

    def test_each_place_is_as_likely(self):
        images = torch.arange(64).reshape(1, 1, 8, 8).repeat(9000, 1, 1, 1)
        made = RandomCrop(8, padding=1)(images, draws(9000))
        counts = torch.zeros(3, 3)
        for top in range(3):
            for left in range(3):
                crop = torch.nn.functional.pad(images[:1], [1] * 4)[:, :, top : top + 8, left : left + 8]
                counts[top, left] = (made == crop).all(dim=(1, 2, 3)).sum()
        assert counts.sum() == 9000
        assert stats.chisquare(counts.flatten().numpy()).pvalue > 0.001

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "size must be at least 1, got 0"),
            ({"size": (4, 4, 4)}, "size must be at least 1, got"),
            ({"size": 4.5}, "size must be at least 1, got 4.5"),
            ({"size": True}, "size must be at least 1, got True"),
            ({"size": 4, "padding": -1}, "padding must be at least 0, got -1"),
            ({"size": 4, "padding": (1, 2, 3)}, "padding must be at least 0, got .*: one whole number, two, or four"),
            ({"size": 4, "padding_mode": "mirror"}, "padding_mode must be one of constant, edge, reflect, symmetric"),
        ],
    )
    def test_bad_values(self, arguments, message):
        with pytest.raises(InputError, match=message):
            RandomCrop(**arguments)

    def test_images_that_are_too_small(self):
        with pytest.raises(
            InputError, match=r"size must be at most .*, got \[9, 4\] of \[6, 6\] with padding \[1, 1, 1"
        ):
            RandomCrop((9, 4), padding=1)(noise(2, 3, 6, 6))
        assert RandomCrop((8, 4), padding=1)(noise(2, 3, 6, 6)).shape == (2, 3, 8, 4)
        with pytest.raises(InputError, match="padding in the mode reflect must be less than the image"):
            RandomCrop(4, padding=6, padding_mode="reflect")(noise(2, 3, 6, 6))


class TestFlips:
    @pytest.mark.parametrize(("flip", "dim"), [(RandomHorizontalFlip, 2), (RandomVerticalFlip, 1)])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(2, 4, 5), (3, 36, 40)])  # the second takes more than a processor's cache
    def test_mirrors_half_of_the_images(self, flip, dim, dtype, shape):
        images = noise(1000, *shape, dtype=dtype)
        made = flip()(images, draws(1000))
        flipped = [torch.equal(new, image.flip(dim)) for image, new in zip(images, made, strict=True)]
        same = [torch.equal(new, image) for image, new in zip(images, made, strict=True)]
        assert sum(flipped) + sum(same) == 1000
        assert stats.binomtest(sum(flipped), 1000).pvalue > 0.001

    def test_probability(self):
        images = noise(1000, 1, 3, 3)
        assert torch.equal(RandomHorizontalFlip(0)(images), images)
        assert torch.equal(RandomHorizontalFlip(1)(images), images.flip(3))
        assert torch.equal(RandomVerticalFlip(1)(images), images.flip(2))
        few = (RandomHorizontalFlip(0.1)(images, draws(1000)) != images).any(dim=(1, 2, 3)).sum()
        assert stats.binomtest(int(few), 1000, 0.1).pvalue > 0.001
        with pytest.raises(InputError, match=r"p must be 0 to 1, got 1\.5"):
            RandomHorizontalFlip(1.5)


ALL = [
    RandomCrop(20, padding=3),
    RandomCrop((15, 22), padding=3, padding_mode="reflect"),
    RandomHorizontalFlip(),
    RandomVerticalFlip(),
    RandomAffine(30, (0.2, 0.1), (0.7, 1.3), 10, BILINEAR),
    RandomAffine(30, (0.2, 0.1), (0.7, 1.3), 10, BILINEAR, fill=None),
    RandomAffine(30, (0.2, 0.1), (0.7, 1.3), 10, NEAREST, fill=[9, 3, 7]),
]


@pytest.mark.parametrize("transform", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_row_does_not_depend_on_the_others(transform, dtype):
    """The pixels of a row are the same, to the bit, for each batch size, order, number of threads and memory layout."""
    images = noise(65, 3, 19, 23, dtype=dtype)
    expected = transform(images, draws(65))
    for size in (1, 2, 7, 64):
        parts = [transform(images[rows], draws(65).select(rows)) for rows in torch.arange(65).split(size)]
        assert torch.equal(torch.cat(parts), expected)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(3))
    assert torch.equal(transform(images[order], draws(65).select(order)), expected[order])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(transform(channels_last, draws(65)), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(transform(images, draws(65)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_one_image(transform):
    image = noise(3, 19, 23)
    torch.manual_seed(0)
    made = transform(image)
    torch.manual_seed(0)
    from_pil = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert made.dtype == torch.uint8 and made.ndim == 3
    assert torch.equal(made, from_pil)


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_use_changes_no_hash(transform):
    """The hash of a transform is a part of the key of cached teacher outputs."""
    before = fingerprint(transform)
    transform(noise(3, 3, 19, 29))
    assert fingerprint(transform) == fingerprint(pickle.loads(pickle.dumps(transform))) == before


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_works_on_another_device(transform):
    """All tensors are on the images' device, and no value is copied to the CPU: a meta tensor has no values."""
    index = torch.arange(4)
    images = torch.empty(4, 3, 19, 23, dtype=torch.uint8, device="meta")
    made = transform(images, Draws(0, index, index, "meta"))
    assert made.device.type == "meta" and made.dtype == torch.uint8
    with pytest.raises(RuntimeError):
        images + torch.empty(4, 3, 19, 23)
