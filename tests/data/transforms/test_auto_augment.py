"""RandAugment and TrivialAugment of whole batches: each operation and its distribution, against torchvision's."""

from collections import Counter

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.transforms import Draws, auto_augment
from kd_lightning.data.transforms.auto_augment import (
    OPERATIONS,
    RandAugment,
    TrivialAugmentWide,
    apply_operations,
    posterize,
    solarize,
)

NEAREST, BILINEAR = v2.InterpolationMode.NEAREST, v2.InterpolationMode.BILINEAR
# Of operations with two directions. Rotations by 45 degrees put pixels between two others, where rounding decides.
WIDEST = [0, 0.99, 0.99, 15.9, 15.9, 134, 0.99, 0.99, 0.99, 0.99]
CLASSES = {"rand": (RandAugment, v2.RandAugment), "trivial": (TrivialAugmentWide, v2.TrivialAugmentWide)}


def rows(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, torch.zeros_like(index))


def pictures(count, channels=3, size=(21, 31), dtype=torch.uint8, seed=0):
    """Noise on gradients. One image has one colour, one uses few levels, one is dark, one is black and white."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 120, (count, channels, *size), generator=generator)
    images = (noise + torch.linspace(0, 135, size[1]).long()).to(torch.uint8)
    images[0] = 77
    images[1] = images[1] // 64 * 64
    images[2] //= 3
    images[3] = (images[3] > 100) * 255
    return images if dtype == torch.uint8 else v2.functional.to_dtype(images, dtype, scale=True)


def by_torchvision(images, operation, magnitude, interpolation=NEAREST, fill=None):
    """Each image by torchvision."""
    apply = v2.RandAugment()._apply_image_or_video_transform
    steps = zip(images, operation.tolist(), magnitude.tolist(), strict=True)
    return torch.stack([apply(x, OPERATIONS[n], size, interpolation, {torch.Tensor: fill}) for x, n, size in steps])


def strengths(number, count):
    """Strengths of one operation over its whole range, with 0."""
    if OPERATIONS[number] == "Posterize":
        return torch.arange(count, dtype=torch.float64) % 7 + 2
    if OPERATIONS[number] == "Solarize":
        return torch.linspace(1.0, 0.0, count).double()
    most = WIDEST[number] if number < len(WIDEST) else 0
    return torch.linspace(-most, most, count, dtype=torch.float64)


def share_of_differences(made, expected, tolerance=0.0):
    return ((made.double() - expected.double()).abs() > tolerance).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=OPERATIONS)
def test_each_operation(number, channels, dtype):
    images = pictures(31, channels, dtype=dtype)
    operation, magnitude = torch.full((31,), number), strengths(number, 31)
    made = apply_operations(images, operation, magnitude)
    expected = by_torchvision(images, operation, magnitude)
    assert made.dtype == dtype
    if number in range(1, 6):
        assert share_of_differences(made, expected) < 1e-4
    elif dtype == torch.uint8:
        assert torch.equal(made, expected)
    else:
        assert torch.allclose(made, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [None, 0, 9, [3, 90.4, 200.6]])
@pytest.mark.parametrize("interpolation", [NEAREST, BILINEAR])
def test_outside_of_the_image(interpolation, fill, dtype):
    """A pixel differs from torchvision's if its place, in float32, lies between two pixels."""
    images = pictures(60, dtype=dtype)
    operation = torch.arange(60) % 5 + 1
    magnitude = torch.tensor(WIDEST, dtype=torch.float64)[operation] * torch.linspace(-1, 1, 60, dtype=torch.float64)
    if dtype != torch.uint8 and fill is not None:
        fill = [value / 255 for value in fill] if isinstance(fill, list) else fill / 255
    made = apply_operations(images, operation, magnitude, interpolation, fill)
    expected = by_torchvision(images, operation, magnitude, interpolation, fill)
    if dtype == torch.float64:
        assert torch.allclose(made, expected, rtol=0, atol=0 if interpolation == NEAREST else 1e-12)
    elif interpolation == NEAREST:
        assert share_of_differences(made, expected) < 1e-4
    else:
        tolerance = 1 if dtype == torch.uint8 else 1e-5
        assert share_of_differences(made, expected, tolerance) == 0
        assert share_of_differences(made, expected, 1e-5) < 1e-4


@pytest.mark.parametrize("levels", [range(9), range(8, -1, -1)])
def test_posterize(levels):
    bits = torch.tensor(levels)
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(9, 3, 1, 1)
    for images in (ramp, ramp / 255):
        made = posterize(images, bits.double())
        expected = [v2.functional.posterize(x, int(n)) for x, n in zip(images, bits, strict=True)]
        assert torch.equal(made, torch.stack(expected))


def test_solarize_at_each_threshold():
    """Thresholds between two levels, on a level, and a rounding error of float32 beside it."""
    threshold = torch.cat([torch.linspace(0, 255, 511).double(), 255 * torch.linspace(1.0, 0.0, 31).double()])
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(len(threshold), 1, 1, 1)
    for images, limits in ((ramp, threshold), (ramp / 255, threshold / 255)):
        made = solarize(images, limits)
        expected = [v2.functional.solarize(x, t) for x, t in zip(images, limits.tolist(), strict=True)]
        assert torch.equal(made, torch.stack(expected))


@pytest.mark.parametrize("name", CLASSES)
def test_operations_and_strengths_as_torchvision_has_them(name, monkeypatch):
    """The same pairs of operation and strength occur, as often as torchvision's."""
    ours, theirs = CLASSES[name]
    made, expected = Counter(), Counter()

    def count(images, operation, magnitude, *_):
        names = [OPERATIONS[number] for number in operation]
        made.update(zip(names, magnitude.tolist(), strict=True))
        return images

    monkeypatch.setattr(auto_augment, "apply_operations", count)
    ours()(torch.zeros(1, 1, 20, 50, dtype=torch.uint8).expand(20_000, -1, -1, -1), rows(20_000))

    class Counted(theirs):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
            expected[transform_id, magnitude] += 1
            return image

    image, counted = torch.zeros(1, 20, 50, dtype=torch.uint8), Counted()
    torch.manual_seed(0)
    for _ in range(6_000):
        counted(image)
    assert set(expected) <= set(made)
    assert len(made) == (5 + 2 * 9 if name == "rand" else 3 + 9 * 61 + 7 + 31)
    kinds = [Counter() for _ in range(2)]
    for counts, found in zip(kinds, (made, expected), strict=True):
        for (operation, strength), times in found.items():
            counts[operation, strength > 0, abs(strength) > 14] += times
    keys = sorted(set(kinds[0]) | set(kinds[1]))
    table = [[counts[key] for key in keys] for counts in kinds]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_rounds_are_independent(monkeypatch):
    rounds = []

    def keep(images, operation, magnitude, *_):
        rounds.append((operation, magnitude))
        return images

    monkeypatch.setattr(auto_augment, "apply_operations", keep)
    RandAugment(num_ops=3)(torch.zeros(1, 1, 4, 4, dtype=torch.uint8).expand(40_000, -1, -1, -1), rows(40_000))
    assert len(rounds) == 3
    for (first, one), (second, other) in ((rounds[0], rounds[1]), (rounds[1], rounds[2])):
        pairs = torch.bincount(first * len(OPERATIONS) + second, minlength=len(OPERATIONS) ** 2)
        assert stats.chisquare(pairs).pvalue > 1e-3
        turned = (first == 5) & (second == 5)
        same = ((one > 0) == (other > 0))[turned].double().mean()
        assert abs(same - 0.5) < 4 * 0.5 / turned.sum().sqrt()


@pytest.mark.parametrize("name", CLASSES)
def test_whole_chain_by_torchvision(name, monkeypatch):
    """torchvision's operations of the same names and strengths, one after another."""
    steps = []

    def keep(images, operation, magnitude, interpolation, fill):
        steps.append((operation, magnitude, interpolation, fill))
        return apply_operations(images, operation, magnitude, interpolation, fill)

    monkeypatch.setattr(auto_augment, "apply_operations", keep)
    images = pictures(200)
    expected, made = images, CLASSES[name][0](fill=[125, 3, 77])(images, rows(200))
    for step in steps:
        expected = by_torchvision(expected, *step)
    assert len(steps) == (2 if name == "rand" else 1)
    turned_by_45 = ((steps[0][0] == 5) & (steps[0][1] % 45 == 0)).reshape(-1, 1, 1, 1)
    assert torch.equal(made.where(~turned_by_45, 0), expected.where(~turned_by_45, 0))
    assert share_of_differences(made, expected) < 1e-4
    assert (made != images).flatten(1).any(dim=1).double().mean() > 0.7


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", CLASSES)
def test_a_row_does_not_depend_on_the_others(name, dtype, monkeypatch):
    images = pictures(130, dtype=dtype)
    for interpolation in (NEAREST, BILINEAR):
        transform = CLASSES[name][0](interpolation=interpolation, fill=0.3)
        whole = transform(images, rows(130))
        order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
        assert torch.equal(transform(images[order], rows(130).select(order)), whole[order])
        for size in (1, 2, 7, 64, 65):
            parts = [rows(130).select(part) for part in torch.arange(130).split(size)]
            made = [transform(x, draws) for x, draws in zip(images.split(size), parts, strict=True)]
            assert torch.equal(torch.cat(made), whole)
        with monkeypatch.context() as patch:
            patch.setattr(auto_augment, "_PIXELS", 5_000)
            assert torch.equal(transform(images, rows(130)), whole)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - before)
            assert torch.equal(transform(images, rows(130)), whole)
        finally:
            torch.set_num_threads(before)


def test_input_stays_as_it_is():
    images = pictures(40)
    before = images.clone()
    RandAugment(magnitude=30)(images, rows(40))
    assert torch.equal(images, before)
    assert RandAugment(num_ops=0)(images, rows(40)).equal(before)
    assert RandAugment()(images[:0], rows(0)).shape == (0, 3, 21, 31)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment(num_ops=-1), "num_ops must be at least 0, got -1"),
        (lambda: RandAugment(magnitude=31), "magnitude must be from 0 to num_magnitude_bins - 1 = 30, got 31"),
        (lambda: RandAugment(magnitude=-1), "magnitude must be from 0"),
        (lambda: TrivialAugmentWide(num_magnitude_bins=1), "num_magnitude_bins must be at least 2, got 1"),
        (lambda: RandAugment(interpolation=v2.InterpolationMode.BICUBIC), "interpolation"),
        (lambda: TrivialAugmentWide(interpolation=v2.InterpolationMode.BICUBIC), "interpolation"),
        (lambda: RandAugment()(pictures(4, channels=4)), "1 or 3 channels.*4 channels of torch.uint8"),
        (lambda: RandAugment()(pictures(4).int()), "torch.uint8.*3 channels of torch.int32"),
        (lambda: RandAugment(fill=[1, 2])(pictures(40), rows(40)), "fill"),
        (lambda: TrivialAugmentWide(fill=[1, 2])(pictures(4)[:1], rows(1)), "fill"),
        (lambda: RandAugment(fill=256)(pictures(4)), "fill must be from 0 to 255.*256"),
        (lambda: RandAugment(fill=[120.0])(pictures(4, dtype=torch.float32)), "fill.*1.*120"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(InputError, match=message):
        make()
