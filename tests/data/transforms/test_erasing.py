"""Erased rectangles of batches: pixels against torchvision's function, and places against its class."""

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.transforms import Draws
from kd_lightning.data.transforms.erasing import RandomErasing, erase


def rows(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, index % 3)


def noise(*shape, dtype=torch.uint8):
    """Images without a 0."""
    made = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


def by_torchvision(images, places, values):
    """torchvision's function on each image. Its values have the size of the rectangle."""
    made = []
    for image, (top, left, height, width), value in zip(images, places.tolist(), values, strict=True):
        if value.ndim == 3:
            value = value[:, top : top + height, left : left + width]
        made.append(
            v2.functional.erase(image, top, left, height, width, value.view(len(value), *value.shape[1:] or (1, 1)))
        )
    return torch.stack(made)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 30), (1, 7), (60, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_as_torchvision(size, channels, dtype, layout):
    images = noise(40, channels, *size, dtype=dtype).contiguous(memory_format=layout)
    before = images.clone()
    places = RandomErasing(0.9, (0.0, 0.9), (0.1, 10.0)).places(*size, rows(40))
    for value in ([0.0], [7.0], [0.3, 120.0, 255.0][:channels]):
        made = RandomErasing(0.9, (0.0, 0.9), (0.1, 10.0), value)(images, rows(40))
        assert made.dtype == dtype
        assert torch.equal(made, by_torchvision(images, places, [torch.tensor(value)] * 40))
        assert made.is_contiguous(memory_format=layout)
    assert (made != before).any() or min(size) == 1
    assert torch.equal(images, before)


def test_pixels_of_given_places():
    """Corners, the whole image, a row, a column, one pixel and nothing."""
    images = noise(7, 3, 6, 9)
    places = [(0, 0, 2, 3), (4, 6, 2, 3), (0, 0, 6, 9), (5, 0, 1, 9), (0, 8, 6, 1), (3, 4, 1, 1), (2, 2, 0, 0)]
    made = erase(images, torch.tensor(places), torch.zeros(1, dtype=torch.uint8))
    assert (made == 0).all(dim=1).flatten(1).sum(dim=1).tolist() == [6, 6, 54, 9, 6, 1, 0]
    assert torch.equal(made, by_torchvision(images, torch.tensor(places), [torch.zeros(1)] * 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_values(dtype):
    images = torch.full((300, 3, 20, 20), 9.0, dtype=dtype)
    images[5] = torch.inf
    transform = RandomErasing(1.0, (0.2, 0.5), value="random")
    made, places = transform(images, rows(300)), transform.places(20, 20, rows(300))
    kept = by_torchvision(images, places, [torch.zeros(1)] * 300) != 0
    assert torch.equal(made[kept], images[kept])
    new = made[~kept].double()
    assert stats.kstest(new, "norm").pvalue > 1e-3
    assert len(new.unique()) > 0.98 * len(new)  # of each channel, image and pixel
    assert torch.equal(transform(images[7:9], rows(300).select(torch.arange(7, 9))), made[7:9])


CASES = {
    "default": ({}, (32, 32)),
    "wide image": ({"p": 1.0, "scale": (0.05, 0.6), "ratio": (0.5, 4.0)}, (20, 70)),
    "tall image": ({"p": 0.8, "scale": (0.2, 0.9)}, (41, 12)),
    "tiny image": ({"p": 0.7}, (4, 3)),
    "small ratio": ({"p": 1.0, "scale": (0.01, 0.06), "ratio": (0.05, 0.1)}, (48, 48)),
    "seldom fits": ({"p": 1.0, "scale": (0.8, 1.0), "ratio": (0.3, 3.3)}, (30, 30)),
}


def torchvision_places(arguments, size, count):
    transform, image = v2.RandomErasing(**arguments), torch.zeros(1, *size)
    places = torch.zeros(count, 4, dtype=torch.long)
    torch.manual_seed(0)
    for place in places:
        if torch.rand(1) < transform.p:
            made = transform.make_params([image])
            if made["v"] is not None:
                place.copy_(torch.tensor([made[key] for key in "ijhw"]))
    return places


@pytest.mark.parametrize("name", CASES)
def test_places_as_torchvision(name):
    """Each of top, left, height and width, their shares of the room, and the area have torchvision's distribution."""
    arguments, size = CASES[name]
    made = RandomErasing(**arguments).places(*size, rows(20_000))
    expected = torchvision_places(arguments, size, 6_000)
    top, left, height, width = made.unbind(1)
    assert made.dtype == torch.int64
    assert (made >= 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    erased = [(places[:, 2] * places[:, 3] > 0).double() for places in (made, expected)]
    spread = (erased[0].mean() * (1 - erased[0].mean()) * (1 / 20_000 + 1 / 6_000)).sqrt()
    assert (erased[0].mean() - erased[1].mean()).abs() <= 4 * spread
    made, expected = (places[there > 0].double() for places, there in zip((made, expected), erased, strict=True))
    for number in range(4):
        assert stats.ks_2samp(made[:, number], expected[:, number]).pvalue > 1e-3
    for compute in (
        lambda place: place[:, 2] * place[:, 3],
        lambda place: place[:, 2] / place[:, 3],
        lambda place: place[:, 0] / (size[0] - place[:, 2] + 1),
        lambda place: place[:, 1] / (size[1] - place[:, 3] + 1),
    ):
        assert stats.ks_2samp(compute(made), compute(expected)).pvalue > 1e-3


def test_numbers_of_a_place_are_independent():
    top, left, height, width = RandomErasing(1.0).places(64, 64, rows(20_000)).double().unbind(1)
    down, right = (top + 0.5) / (65 - height), (left + 0.5) / (65 - width)
    table = torch.stack([down, right, height * width, (height / width).log()])
    assert (torch.corrcoef(table) - torch.eye(4)).abs().max() < 4 / 20_000**0.5


class TestLimits:
    def test_never(self):
        images = noise(500, 3, 8, 8)
        assert torch.equal(RandomErasing(p=0.0)(images, rows(500)), images)

    def test_always(self):
        made = RandomErasing(p=1.0)(noise(500, 3, 32, 32), rows(500))
        assert (made == 0).flatten(1).any(dim=1).all()

    def test_no_area(self):
        images = noise(50, 3, 8, 8)
        assert torch.equal(RandomErasing(p=1.0, scale=(0.0, 0.0))(images, rows(50)), images)

    @pytest.mark.parametrize("size", [(8, 8), (1, 1), (1, 40), (2, 3)])
    def test_no_try_fits(self, size):
        """The rectangle is as large as the image: the image stays, as with torchvision."""
        images = noise(50, 3, *size)
        assert torch.equal(RandomErasing(p=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))(images, rows(50)), images)

    def test_one_size(self):
        """Cutout: a square of half the side, anywhere."""
        cutout = RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
        top, left, height, width = cutout.places(32, 32, rows(5000)).unbind(1)
        assert (height == 16).all() and (width == 16).all()
        for place in (top, left):
            assert stats.chisquare(torch.bincount(place, minlength=17)).pvalue > 1e-3

    def test_no_rows(self):
        assert RandomErasing()(noise(0, 3, 8, 8), rows(0)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("value", [3, "random"])
def test_a_row_does_not_depend_on_the_others(dtype, value):
    if value == "random" and dtype == torch.uint8:
        value = [1, 2, 3]
    images = noise(130, 3, 17, 19, dtype=dtype)
    transform = RandomErasing(0.7, value=value)
    whole = transform(images, rows(130))
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    for size in (1, 2, 7, 64, 65):
        made = [transform(images[part], rows(130).select(part)) for part in order.split(size)]
        assert torch.equal(torch.cat(made), whole[order])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert torch.equal(transform(images, rows(130)), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomErasing(p=1.1), "p must be 0 to 1, got 1.1"),
        (lambda: RandomErasing(scale=(0.3, 0.1)), r"scale must be .* from 0 to 1, got \(0.3, 0.1\)"),
        (lambda: RandomErasing(scale=(0.3, 1.1)), "scale must be"),
        (lambda: RandomErasing(scale=(-0.1, 1.0)), "scale must be"),
        (lambda: RandomErasing(ratio=(0.0, 1.0)), "ratio must be .* above 0"),
        (lambda: RandomErasing(ratio=(2.0, 1.0)), "ratio must be"),
        (lambda: RandomErasing(value="noise"), "value must be a number, one for each channel, or random, got noise"),
        (lambda: RandomErasing(value=None), "value must be a number"),
        (lambda: RandomErasing(value=[]), "value must be a number"),
        (lambda: RandomErasing(value=[1, 2])(noise(2, 3, 4, 4)), r"value must be one number, or 3 for .*\[1, 2\]"),
        (lambda: RandomErasing(value=256)(noise(2, 3, 4, 4)), "value must be 0 to 255 .*got 256"),
        (lambda: RandomErasing(value="random")(noise(2, 3, 4, 4)), "value random needs float images, got torch.uint8"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(InputError, match=message):
        make()
