"""The sources' transforms; strong views: shapes, ranges, replay, stronger than weak views, and still of their class."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from kd_lightning import Digits, InputError
from kd_lightning.data.transforms import (
    Compose,
    Draws,
    photo_transforms,
    segmentation_transforms,
    small_image_transforms,
    strong_colors,
    strong_digits,
    strong_photos,
    strong_small,
    to_float,
)
from kd_lightning.data.transforms.auto_augment import RandAugment
from kd_lightning.data.transforms.color import ColorJitter, GaussianBlur, RandomGrayscale
from kd_lightning.data.transforms.erasing import RandomErasing
from kd_lightning.data.transforms.resize import RandomResizedCrop
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.runs.build import build

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def to_bytes(count, channels=3, side=32):
    """Smooth uint8 images (N, C, side, side) of several colours; no pixel is black or white."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(2))
    images = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (20 + 210 * images).to(torch.uint8)


def to_pil(image):
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).squeeze(2).numpy()))


def weak_small():
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *tail]), v2.Compose(tail)


def digits():
    return Digits().load().train.images.tensors[0]


def identity(image):
    return image


CASES = {  # strong, weak, evaluation, images
    "digits": lambda: (strong_digits(), Digits().train_transform, identity, digits()[:100]),
    "small": lambda: (strong_small(MEAN, STD), *weak_small(), to_bytes(100)),
    "photos": lambda: (strong_photos(56), *photo_transforms(56), to_bytes(100, side=64)),
}


def views(transform, images, view=0, seed=3):
    """That view of all images, (N, C, H, W)."""
    dataset = ViewDataset([TensorDataset(images)], torch.arange(len(images)), transform, seed)
    return dataset.__getitems__([(n, view) for n in range(len(images))]).x


def rows(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, torch.zeros_like(index))


def without(transform, *parts):
    """A transform without some of its steps."""
    return Compose([step for step in transform.transforms if not isinstance(step, parts)])


@pytest.mark.parametrize(("name", "shape"), [("digits", (1, 8, 8)), ("small", (3, 32, 32)), ("photos", (3, 56, 56))])
def test_output(name, shape):
    strong, _, _, images = CASES[name]()
    x = views(strong, images)
    assert x.shape[1:] == shape
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert type(x) is torch.Tensor
    if name == "digits":
        assert x.min() == 0
        assert x.max() <= 1
        assert x.max() > 0.99


@pytest.mark.parametrize("name", CASES)
def test_same_seed_same_view(name):
    strong, _, _, images = CASES[name]()
    first = views(strong, images)
    torch.rand(9), np.random.rand(9)
    assert torch.equal(views(strong, images), first)
    for other in (views(strong, images, view=1), views(strong, images, seed=4)):
        assert ((other - first).abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_stronger_than_the_weak_view(name):
    strong, weak, evaluation, images = CASES[name]()
    plain = torch.stack([evaluation(image) for image in images])
    near, far = ((views(t, images) - plain).abs().mean().item() for t in (weak, strong))
    assert far > 1.1 * near > 0


def test_digits_stay_of_their_class():
    """Nearest neighbours among strong views of training images classify strong views of test images."""
    parts = Digits().load()
    known = torch.cat([views(strong_digits(), digits(), view) for view in range(3)])
    model = KNeighborsClassifier(5).fit(known.flatten(1), parts.train.targets.repeat(3))
    truth = parts.test.targets.numpy()[:400]
    found = model.predict(views(strong_digits(), parts.test.images.tensors[0][:400]).flatten(1))
    assert (found == truth).mean() > 0.6
    for digit, other in ((6, 9), (9, 6)):
        assert (found[truth == digit] == other).mean() < 0.1


@pytest.mark.parametrize("transform", [strong_small(MEAN, STD), strong_photos(32)])
def test_any_kind_of_image(transform):
    for seed, image in enumerate(to_bytes(20)):
        made = []
        for given in (image, to_pil(image), v2.functional.to_dtype(image, torch.float32, scale=True)):
            torch.manual_seed(seed)
            made.append(transform(given))
        assert torch.allclose(made[0], made[1], atol=1e-6)
        assert torch.allclose(made[0], made[2], atol=1e-6)


def test_grey_images():
    images = to_bytes(30, channels=1, side=28)
    small = strong_small([0.1307], [0.3081], size=28, padding=2, flip=False)
    assert views(small, images).shape == (30, 1, 28, 28)
    assert small(to_pil(images[0])).shape == (1, 28, 28)
    assert strong_photos(24)(to_pil(images[0])).shape == (3, 24, 24)
    assert strong_photos(24)(images[0]).shape == (3, 24, 24)


def test_pictures_of_different_sizes_and_types():
    """A list of pictures gives what each picture gives alone."""
    colour, grey = to_bytes(4, side=40), to_bytes(4, channels=1, side=64)
    images = [*colour[:, :, :30], *grey[:, :, :, :47], *(colour / 255)]
    transform = strong_photos((24, 36))
    made = transform(images, rows(12))
    assert made.shape == (12, 3, 24, 36)
    for n, image in enumerate(images):
        assert torch.equal(transform([image], rows(12).select(torch.tensor([n])))[0], made[n])
    assert torch.equal(transform(colour, rows(4)), transform([*colour], rows(4)))


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_the_others(name):
    strong, _, _, images = CASES[name]()
    whole = strong(images, rows(100))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 65):
        made = [strong(images[part], rows(100).select(part)) for part in order.split(size)]
        assert torch.equal(torch.cat(made), whole[order])


@pytest.mark.parametrize(("transform", "side"), [(strong_small(MEAN, STD), 32), (strong_photos(64), 64)])
def test_cutout_of_half_the_side(transform, side):
    for image in views(transform, to_bytes(30, side=side)):
        hole = (image == 0).all(dim=0)
        rows, columns = hole.sum(dim=1), hole.sum(dim=0)
        assert ((rows >= side // 2).sum(), (columns >= side // 2).sum()) == (side // 2, side // 2)


def test_cutout_of_digits():
    """Cutout alone removes nothing but the square from a white image."""
    cutout = strong_digits().transforms[-1]
    torch.manual_seed(0)
    for _ in range(20):
        hole = cutout(torch.ones(1, 8, 8))[0] == 0
        rows, columns = hole.any(dim=1).sum(), hole.any(dim=0).sum()
        assert (rows, columns, hole.sum()) == (2, 2, 4)


@pytest.mark.parametrize(("flip", "found"), [(True, {False, True}), (False, {False})])
def test_flip(flip, found):
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 200
    made = strong_small([0.0] * 3, [1.0] * 3, padding=0, flip=flip)
    steps = without(made, RandAugment, RandomErasing)
    torch.manual_seed(0)
    assert {bool(steps(image)[0, 0, 0] > 0.5) for _ in range(30)} == found


def test_outside_is_the_mean_colour():
    """New pixels of RandAugment's rotations and shifts become about 0, as those of Cutout."""
    transform = strong_small(MEAN, STD, padding=0, flip=False)
    steps = without(transform, RandomErasing)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    outside = [steps(white)[:, [0, 0, -1, -1], [0, -1, 0, -1]] for _ in range(200)]
    moved = [corners for corners in outside if (corners.abs() < 0.05).all(dim=0).any()]
    assert len(moved) > 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: strong_small([0.5], [0.5, 0.5]), r"a number for each channel, got \[0.5\] and \[0.5, 0.5\]"),
        (lambda: strong_small([], []), "a number for each channel"),
        (lambda: strong_small([0.5], [0.0]), r"std must be above 0, got \[0.0\]"),
        (lambda: strong_small([0.5], [0.5], size=1), "size must be at least 2, got 1"),
        (lambda: strong_small([0.5], [0.5], padding=-1), "padding must be at least 0, got -1"),
        (lambda: strong_photos(0), "size must be at least 2, got 0"),
        (lambda: strong_colors([0.5], [0.5, 0.5]), r"a number for each channel, got \[0.5\] and \[0.5, 0.5\]"),
        (lambda: strong_colors([0.5], [0.0]), r"std must be above 0, got \[0.0\]"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("strong_digits", {}),
        ("strong_small", {"mean": MEAN, "std": STD, "flip": False}),
        ("strong_photos", {}),
        ("strong_colors", {}),
        ("strong_colors", {"mean": MEAN, "std": STD}),
    ],
)
def test_from_yaml(name, arguments):
    config = {"class_path": f"kd_lightning.data.transforms.{name}", "init_args": arguments}
    assert isinstance(build(nn.Module, config), nn.Module)


class TestStrongColors:
    """The strong view of a weak, normalised one: its labels stay where they are."""

    def test_without_changes_it_returns_what_it_gets(self):
        images = Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(to_bytes(9))
        steps = without(strong_colors(MEAN, STD), ColorJitter, RandomGrayscale, GaussianBlur)
        torch.testing.assert_close(steps(images), images, rtol=0, atol=1e-5)

    def test_by_hand(self):
        """The steps on plain images in [0, 1], by the draws of their streams."""
        plain, steps = to_bytes(50).float() / 255, strong_colors(MEAN, STD)
        assert [type(step).__name__ for step in steps.transforms][1:4] == [
            "ColorJitter",
            "RandomGrayscale",
            "GaussianBlur",
        ]
        expected = plain
        for number in (1, 2, 3):
            expected = steps.transforms[number](expected, rows(50).stream(number))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        found = steps((plain - mean) / std, rows(50))
        torch.testing.assert_close(found, (expected - mean) / std, rtol=0, atol=1e-3)
        assert ((found * std + mean - plain).abs().mean(dim=(1, 2, 3)) > 0.01).float().mean() > 0.9
        assert ((found * std + mean).std(dim=1).amax(dim=(1, 2)) < 1e-3).sum() in range(3, 20)  # grey

    def test_no_pixel_moves(self):
        """An edge stays between its two columns, and masks stay as they are."""
        images = torch.full((40, 3, 24, 24), 0.2)
        images[..., 10:] = 0.8
        weak = v2.functional.normalize(images, MEAN, STD)
        strong = strong_colors(MEAN, STD)(weak, rows(40))
        steepest = strong.diff(dim=3).abs().sum(dim=(1, 2)).argmax(dim=1)
        assert (steepest == 9).all()
        masks = torch.arange(40 * 24 * 24).view(40, 24, 24)
        assert torch.equal(strong_colors().masks(masks, rows(40)), masks)

    def test_a_row_does_not_depend_on_the_others(self):
        images, transform = torch.rand(20, 3, 16, 16) - 0.5, strong_colors([0.5], [1.0])
        images = images[:, :1]
        whole = transform(images, rows(20))
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        parts = [transform(images[part], rows(20).select(part)) for part in order.split(3)]
        assert torch.equal(torch.cat(parts), whole[order])
        assert whole.shape == images.shape

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (to_bytes(2), "strong_colors takes normalised images, got torch.uint8"),
            (torch.zeros(2, 1, 8, 8), "images must have 3 channels, as mean and std have, got 1"),
            (
                torch.full((2, 3, 8, 8), 3.0),
                r"must be those of the weak view, but give values of 1.* to 1.*, not 0 to 1",
            ),
            (torch.full((2, 3, 8, 8), -3.0), "must be those of the weak view"),
        ],
    )
    def test_other_images(self, images, message):
        with pytest.raises(InputError, match=message):
            strong_colors()(images)


class TestDefaults:
    """The sources' own transforms."""

    @pytest.mark.parametrize("size", [24, (24, 40), (30, 14)])
    def test_photos(self, size):
        images = [*to_bytes(3, side=50)[:, :, :37], *to_bytes(3, channels=1, side=64)]
        train, evaluation = photo_transforms(size)
        side = [size, size] if isinstance(size, int) else [*size]
        crop = next(part for part in train.transforms if isinstance(part, RandomResizedCrop))
        assert crop.ratio == pytest.approx((3 / 4 * side[1] / side[0], 4 / 3 * side[1] / side[0]))
        tail = [v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
        tail = v2.Compose([*tail, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
        number = [*train.transforms].index(crop)
        places = crop.places([image.shape[1:] for image in images], rows(6).stream(number)).tolist()
        made = train(images, rows(6))
        flipped = 0
        for image, new, place in zip(images, made, places, strict=True):
            wanted = tail(v2.functional.resized_crop(image, *place, side))
            mirror = not torch.allclose(new, wanted, atol=1e-5)
            assert torch.allclose(new, wanted.flip(2) if mirror else wanted, atol=1e-5)
            flipped += mirror
        assert 0 < flipped < 6
        for image, new in zip(images, evaluation(images, rows(6)), strict=True):
            cover = [part * 8 // 7 for part in side]
            scale = max(cover[0] / image.shape[1], cover[1] / image.shape[2])
            whole = [max(least, round(scale * now)) for least, now in zip(cover, image.shape[1:], strict=True)]
            if isinstance(size, int):  # torchvision rounds the longer side down
                whole = [size * 8 // 7]
            wanted = tail(v2.functional.center_crop(v2.functional.resize(image, whole), side))
            assert torch.allclose(new, wanted, atol=1e-5)

    @pytest.mark.parametrize("size", [24, (24, 40), (30, 14)])
    def test_segmentation(self, size):
        """The colour changes that of the image alone; evaluation leaves out no position."""
        images = [*to_bytes(3, side=50)[:, :, :37], *to_bytes(3, channels=1, side=64)]
        train, evaluation = segmentation_transforms(size)
        side = (size, size) if isinstance(size, int) else size
        masks = [(image[0] > 120).long() for image in images]
        tail = [v2.RGB(), v2.Resize([*side]), v2.ToDtype(torch.float32, scale=True)]
        tail = v2.Compose([*tail, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
        made, moved = evaluation.with_masks(images, masks, rows(6))
        for image, mask, new, label in zip(images, masks, made, moved, strict=True):
            assert torch.allclose(new, tail(image), atol=1e-5)
            exact = v2.functional.resize(mask[None], [*side], interpolation=v2.InterpolationMode.NEAREST_EXACT)
            assert torch.equal(label, exact[0])
        made, moved = train.with_masks(images, masks, rows(6))
        assert made.shape == (6, 3, *side) and moved.shape == (6, *side) and moved.min() >= 0
        assert not torch.allclose(made, without(train, ColorJitter)(images, rows(6)), atol=0.1)
        for new, label in zip(made[:, 0], moved, strict=True):  # colours keep the order of levels, but for the blend
            if 0 < label.double().mean() < 1:
                assert new[label == 1].mean() > new[label == 0].mean() + 0.1

    @pytest.mark.parametrize(("channels", "flip"), [(3, True), (3, False), (1, False)])
    def test_small_images(self, channels, flip):
        images = to_bytes(40, channels)
        mean, std = MEAN[:channels], STD[:channels]
        train, evaluation = small_image_transforms(mean, std, 32, flip=flip)
        tail = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
        assert torch.allclose(evaluation(images), tail(images), atol=1e-5)
        assert torch.allclose(evaluation(to_pil(images[0])), tail(images[0]), atol=1e-5)
        padded = tail(v2.functional.pad(images, [4]))
        mirrored = 0
        for image, new in zip(padded, train(images, rows(40)), strict=True):
            places = [(top, left) for top in range(9) for left in range(9)]
            crops = torch.stack([image[:, top : top + 32, left : left + 32] for top, left in places])
            as_is, flipped = ((new - each).abs().amax(dim=(1, 2, 3)).min() < 1e-5 for each in (crops, crops.flip(3)))
            assert as_is or flipped
            mirrored += bool(flipped)
        assert 8 < mirrored < 32 if flip else mirrored == 0

    def test_to_float(self):
        images = to_bytes(5)
        wanted = v2.functional.to_dtype(images, torch.float32, scale=True)
        for given in (images, wanted):
            assert torch.equal(to_float()(given), wanted)
        assert torch.equal(to_float()(to_pil(images[0])), wanted[0])

    @pytest.mark.parametrize("number", [0, 1])
    def test_a_row_does_not_depend_on_the_others(self, number):
        """The pixels of a row are the same, to the bit, for each batch size and order."""
        small = [*to_bytes(65)]
        photos = [image[:, : 40 + n % 7, : 60 - n % 5] for n, image in enumerate(to_bytes(65, side=64))]
        for transform, images in (
            (small_image_transforms(MEAN, STD, 32, flip=True)[number], small),
            (photo_transforms(30)[number], photos),
        ):
            whole = transform(images, rows(65))
            order = torch.randperm(65, generator=torch.Generator().manual_seed(1))
            for size in (1, 2, 7, 64):
                parts = [([images[n] for n in part.tolist()], rows(65).select(part)) for part in order.split(size)]
                assert torch.equal(torch.cat([transform(*part) for part in parts]), whole[order])
