"""Masks move as their images do, to the pixel: against images that show the masks, torchvision, and exact numbers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.transforms import (
    RGB,
    BatchTransform,
    CenterCrop,
    ColorJitter,
    Compose,
    Draws,
    GaussianBlur,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Resize,
    ResizeToCover,
    TrivialAugmentWide,
    auto_augment,
    photo_transforms,
    segmentation_transforms,
    small_image_transforms,
    strong_digits,
    strong_photos,
    strong_small,
    to_float,
)
from kd_lightning.data.transforms.masks import resize_masks

Mode = v2.InterpolationMode
VOID = -100
SHAPES = [(40, 61), (64, 64), (90, 33), (31, 31), (25, 200), (7, 9)]


def draws(count, seed=0, device="cpu"):
    index = torch.arange(count)
    return Draws(seed, index, index % 3, device)


def random_masks(*shape, seed=1):
    """Masks of the classes 1 to 254."""
    return torch.randint(1, 255, shape, generator=torch.Generator().manual_seed(seed))


def ragged_masks(count):
    return [random_masks(*SHAPES[n % len(SHAPES)], seed=n) for n in range(count)]


def shown(masks, dtype=torch.uint8, *, decoded=False):
    """Images of three channels that show masks; if decoded, they lie in memory as (H, W, C)."""
    image = masks.unsqueeze(-3).repeat_interleave(3, -3)
    image = image.to(torch.uint8) if dtype == torch.uint8 else image.to(dtype) / 255
    return image.movedim(-3, -1).contiguous().movedim(-1, -3) if decoded else image


def read(images, outside):
    """The masks that images show. The value ``outside`` means -100."""
    values = (images if images.dtype == torch.uint8 else (images * 255).round())[..., 0, :, :].long()
    return torch.where(values == outside, VOID, values)


def tree(transform, *parts):
    return Compose([transform, *parts])


SAME_SIZE = [  # transform, value of its new pixels
    (lambda fill: RandomHorizontalFlip(), 0),
    (lambda fill: RandomVerticalFlip(), 0),
    (lambda fill: RandomCrop(20), 0),
    (lambda fill: RandomCrop((15, 22), padding=3), 0),
    (lambda fill: RandomCrop(21, padding=[4, 2, 1, 0], fill=fill), 255),
    (lambda fill: RandomCrop((19, 23), padding=5, padding_mode="reflect"), 0),
    (lambda fill: RandomCrop((19, 23), padding=5, padding_mode="symmetric"), 0),
    (lambda fill: RandomCrop((30, 24), padding=[1, 8, 0, 9], padding_mode="edge"), 0),
    (lambda fill: RandomAffine(180), 0),
    (lambda fill: RandomAffine(30, (0.2, 0.3), (0.6, 1.5), (-9, 12, -5, 7), fill=fill), 255),
    (lambda fill: RandAugment(3, 25, fill=fill), 255),
    (lambda fill: TrivialAugmentWide(fill=fill), 255),
    (lambda fill: Resize((30, 17)), None),
    (lambda fill: CenterCrop((12, 33)), 0),
    (lambda fill: CenterCrop((32, 14)), 0),
    (lambda fill: RandomResizedCrop((16, 31), interpolation=Mode.NEAREST), 0),
    (lambda fill: RandomResizedCrop((26, 11), interpolation=Mode.NEAREST_EXACT), 0),
    (lambda fill: tree(v2.Resize((30, 17), Mode.NEAREST)), 0),
    (lambda fill: tree(v2.Resize(16, Mode.NEAREST_EXACT, max_size=19)), 0),
    (lambda fill: tree(v2.Resize(None, Mode.NEAREST, max_size=40)), 0),
    (lambda fill: tree(v2.CenterCrop(26)), 0),
    (lambda fill: tree(v2.Pad([1, 2, 3, 0], fill=fill)), 255),
    (lambda fill: tree(v2.Pad((3, 5), padding_mode="reflect")), 0),
    (lambda fill: tree(v2.Pad(4, padding_mode="symmetric")), 0),
    (lambda fill: tree(v2.Pad(4, padding_mode="edge")), 0),
    (lambda fill: tree(RandomCrop(26, padding=6), RandomHorizontalFlip(), RandomVerticalFlip(), CenterCrop(30)), 0),
    (lambda fill: tree(RandomHorizontalFlip(), tree(RandomAffine(90), RandomCrop((9, 8))), v2.Pad(2)), 0),
]
NEAREST = [case for case in SAME_SIZE if case[1] is not None]


@pytest.mark.parametrize("make", NEAREST)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("decoded", [False, True])
def test_an_image_that_shows_its_mask_shows_it_afterwards(make, dtype, decoded, monkeypatch):
    """Nearest neighbours of image and mask are the same pixels, for odd and even sides."""
    monkeypatch.setattr(auto_augment, "_recolor", lambda images, name, magnitude: images)
    transform = make[0](255 if dtype == torch.uint8 else 1.0)
    for height, width in ((23, 28), (26, 23)):
        masks = random_masks(200, height, width)
        images, moved = transform.with_masks(shown(masks, dtype, decoded=decoded), masks, draws(200))
        assert moved.dtype == torch.int64 and moved.device == masks.device
        assert torch.equal(moved, read(images, make[1]))
        assert not torch.equal(moved, masks)


@pytest.mark.parametrize("mode", [Mode.NEAREST, Mode.NEAREST_EXACT])
@pytest.mark.parametrize("decoded", [False, True])
def test_an_image_of_any_size_that_shows_its_mask_shows_it_afterwards(mode, decoded):
    masks = ragged_masks(120)
    images = [shown(mask, decoded=decoded) for mask in masks]
    for size in (24, (20, 33), (65, 130)):
        transform = RandomResizedCrop(size, interpolation=mode)
        made, moved = transform.with_masks(images, masks, draws(120))
        assert torch.equal(moved, read(made, 0))
    made, moved = CenterCrop((44, 35)).with_masks(images, masks, draws(120))
    assert torch.equal(moved, read(made, 0)) and (moved == VOID).any()


@pytest.mark.parametrize("inputs", [1, 2, 3, 5, 8, 16, 31, 100, 375, 500])
def test_a_resize_reads_the_position_under_its_centre(inputs):
    """The centre of output j is at (j + 1/2) · inputs / outputs. Between two positions either is nearest."""
    for outputs in [*range(1, 140), 224, 512]:
        mask = torch.arange(inputs).repeat(3, 1)
        made = resize_masks(mask, [3, outputs])
        assert torch.equal(made, made[:1].expand(3, -1))
        twice = 2 * torch.arange(outputs) + 1
        lower = twice * inputs // (2 * outputs)
        between = twice * inputs % (2 * outputs) == 0
        assert torch.equal(made[0][~between], lower[~between])
        assert ((made[0] == lower) | (made[0] == lower - 1))[between].all()
        if not between.any():
            picture = Image.fromarray(mask.numpy().astype(np.int32)).resize((outputs, 3), Image.Resampling.NEAREST)
            assert (np.asarray(picture) == made.numpy()).all()


@pytest.mark.parametrize("name", [Mode.NEAREST, "nearest", 0])
def test_each_name_of_an_interpolation(name):
    """torchvision takes a mode, its name, or Pillow's number of it."""
    masks = random_masks(3, 20, 31)
    moved = resize_masks(masks, [13, 44], name)
    assert torch.equal(moved, v2.functional.resize(masks, [13, 44], interpolation=Mode.NEAREST))
    assert not torch.equal(moved, resize_masks(masks, [13, 44]))


def test_classes_never_mix():
    """A resize of two classes has no third one between them, also of numbers that float32 does not hold."""
    masks = torch.where(torch.rand(4, 37, 41, generator=torch.Generator().manual_seed(0)) < 0.5, VOID, 2**40 + 1)
    transforms = [make[0](255) for make in SAME_SIZE]
    for transform in (*transforms, Resize(9), Resize((90, 50)), ResizeToCover(64), RandomResizedCrop(24)):
        moved = transform.masks(masks, draws(4))
        assert moved.unique().tolist() == [VOID, 2**40 + 1]


def centre(weights):
    """Centre of mass, (B, 2), in shares of the height and of the width."""
    weights = weights.double()
    axes = [(torch.arange(side) + 0.5) / side for side in weights.shape[1:]]
    total = weights.sum(dim=(1, 2))
    return torch.stack([(weights.sum(2) * axes[0]).sum(1), (weights.sum(1) * axes[1]).sum(1)], 1) / total[:, None]


@pytest.mark.parametrize(
    "transform",
    [
        Resize((29, 31)),
        Resize(100),
        Resize(24),
        ResizeToCover((50, 90)),
        ResizeToCover((33, 21)),
        RandomResizedCrop((37, 22), (0.7, 1)),
        RandomResizedCrop((90, 111), (0.7, 1)),
        RandomResizedCrop(25, (0.7, 1), antialias=False, interpolation=Mode.BICUBIC),
        tree(v2.Resize((31, 27))),
        tree(v2.Resize(100, Mode.BICUBIC, antialias=False)),
        RandomAffine(180, (0.1, 0.1), (0.7, 1.3), 10, Mode.BILINEAR),
        RandomAffine(180, (0.1, 0.1), (0.7, 1.3), 10, Mode.BILINEAR, fill=None),
        tree(RandomResizedCrop(48, (0.7, 1)), RandomVerticalFlip(), RandomAffine(30, interpolation=Mode.BILINEAR)),
    ],
)
def test_smooth_images_and_their_masks_have_one_centre(transform):
    """A shift by half a pixel is 0.5 / 40 of a side; the average over many images of discs shows far smaller ones."""
    random = torch.Generator().manual_seed(4)
    x, y, radius = torch.tensor([0.4, 0.4, 0.1]).view(3, 1, 1, 1) + torch.rand(3, 400, 1, 1, generator=random) * (
        torch.tensor([0.2, 0.2, 0.05]).view(3, 1, 1, 1)
    )
    down, right = (torch.arange(side) + 0.5 for side in (47, 61))
    inside = (down[:, None] / 47 - y) ** 2 + (right / 61 - x) ** 2 < radius**2
    images, masks = transform.with_masks(inside[:, None].float(), inside.long(), draws(400))
    side = max(images.shape[2:])
    shift = centre(images[:, 0]) - centre((masks == 1).long())
    assert (shift.mean(0).abs() * side < 0.03).all()
    assert ((images[:, 0] > 0.5) != (masks == 1)).double().mean() < 0.01
    assert not torch.equal(masks, masks[:1].expand_as(masks))


def test_affine_maps_as_torchvision():
    masks = random_masks(150, 27, 34)
    transform = RandomAffine(90, (0.2, 0.3), (0.6, 1.5), (-9, 12, -5, 7), Mode.BILINEAR, fill=0.3)
    moved = transform.masks(masks, draws(150))
    parameters = [part.tolist() for part in transform.parameters_of(masks[:, None], draws(150))]
    expected = torch.stack(
        [
            v2.functional.affine(tv_tensors.Mask(mask), *values, fill=VOID).as_subclass(torch.Tensor)
            for mask, *values in zip(masks, *parameters, strict=True)
        ]
    )
    assert (moved != expected).double().mean() < 1e-3
    assert 0.1 < (moved == VOID).double().mean() < 0.6


def test_quarter_turns_and_whole_shifts_are_exact():
    masks = random_masks(2, 5, 5)
    for angle, turned in ((90, masks.rot90(-1, (1, 2))), (180, masks.flip(1, 2)), (-90, masks.rot90(1, (1, 2)))):
        assert torch.equal(RandomAffine((angle, angle)).masks(masks, draws(2)), turned)
    transform = RandomAffine(0, (0.6, 0.6))
    shifts = transform.parameters_of(masks[:, None], draws(2))[1].long().tolist()
    expected = torch.full_like(masks, VOID)
    for row, (right, down) in enumerate(shifts):
        for y in range(5):
            for x in range(5):
                if 0 <= y - down < 5 and 0 <= x - right < 5:
                    expected[row, y, x] = masks[row, y - down, x - right]
    assert torch.equal(transform.masks(masks, draws(2)), expected)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_random_operations_move_masks_as_often_as_images(count):
    """Operations of colour leave masks as they are; of 14 operations 5 move pixels."""
    masks = random_masks(600, 21, 31)
    moved = RandAugment(count, 20).masks(masks, draws(600))
    share = (moved != masks).flatten(1).any(1).double().mean()
    assert abs(share - (1 - (9 / 14) ** count)) < 0.08


@pytest.mark.parametrize(
    "transform",
    [
        RandomErasing(1.0),
        ColorJitter(0.4, 0.4, 0.4, 0.1),
        RandomGrayscale(0.5),
        GaussianBlur(3),
        Normalize([0.5], [0.2]),
        RGB(),
        to_float(),
        tree(v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]), v2.Grayscale(3), v2.Identity()),
    ],
    ids=repr,
)
def test_colours_leave_masks_as_they_are(transform):
    masks = random_masks(30, 9, 12)
    images, moved = transform.with_masks(shown(masks), masks, draws(30))
    assert torch.equal(moved, masks) and len(images) == 30
    assert torch.equal(transform.masks(masks, draws(30)), masks)


def test_recipes_move_masks():
    """Each recipe of this package takes masks; the result has the size of the images."""
    square, photos = random_masks(8, 32, 32), ragged_masks(8)
    digits = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for transform, images, masks in (
        *((one, shown(square), square) for one in small_image_transforms([0.5], [0.5], 32, flip=True)),
        (strong_small([0.5] * 3, [0.5] * 3), shown(square), square),
        (strong_digits(), digits, random_masks(8, 8, 8)),
        (strong_photos((24, 36)), [*map(shown, photos)], photos),
        *((one, [*map(shown, photos)], photos) for one in (*photo_transforms(24), *segmentation_transforms((20, 33)))),
    ):
        transform.check_masks()
        made, moved = transform.with_masks(images, masks, draws(8))
        assert moved.shape == (8, *made.shape[2:])
        assert torch.equal(made, transform(images, draws(8)))


class TestWithMasks:
    """Images are those that the transform gives without masks."""

    @pytest.mark.parametrize("make", SAME_SIZE)
    def test_images_and_masks_are_those_of_single_calls(self, make):
        masks = random_masks(40, 23, 28)
        transform = make[0](255)
        images, moved = transform.with_masks(shown(masks), masks, draws(40))
        assert torch.equal(images, transform(shown(masks), draws(40)))
        assert torch.equal(moved, transform.masks(masks, draws(40)))

    @pytest.mark.parametrize("make", SAME_SIZE)
    def test_a_row_does_not_depend_on_the_others(self, make):
        masks = random_masks(40, 23, 28)
        transform, before = make[0](255), masks.clone()
        whole = transform.masks(masks, draws(40))
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        for part in (order[:1], order, order[:0] if "ResizedCrop" not in repr(transform) else order[:7]):
            assert torch.equal(transform.masks(masks[part], draws(40).select(part)), whole[part])
        assert torch.equal(masks, before)

    @pytest.mark.parametrize("make", SAME_SIZE)
    def test_works_on_another_device(self, make):
        """All tensors are on the masks' device. Crops of random sizes need numbers, which a meta tensor has not."""
        transform = make[0](255)
        masks = torch.empty(4, 23, 28, dtype=torch.int64, device="meta")
        if "RandomResizedCrop" not in repr(transform) and not isinstance(transform, RandAugment | TrivialAugmentWide):
            assert transform.masks(masks, draws(4, device="meta")).device.type == "meta"

    def test_use_changes_no_hash(self):
        masks = random_masks(4, 23, 28)
        for make in SAME_SIZE:
            transform = make[0](255)
            before = fingerprint(transform)
            transform.with_masks(shown(masks), masks, draws(4))
            assert fingerprint(transform) == before

    def test_global_generators_are_left_alone(self):
        masks = random_masks(8, 32, 32)
        state = torch.get_rng_state()
        strong_small([0.5] * 3, [0.5] * 3).with_masks(shown(masks), masks, draws(8))
        assert torch.equal(torch.get_rng_state(), state)

    def test_draws_go_on_after_both(self):
        """A transform outside of a chain uses up the draws of its images once."""
        masks, numbers, alone = random_masks(9, 8, 8), draws(9), draws(9)
        RandomCrop(6).with_masks(shown(masks), masks, numbers)
        RandomCrop(6)(shown(masks), alone)
        assert torch.equal(numbers.uniform(), alone.uniform())

    def test_lists_of_masks_are_as_single_masks(self):
        masks = ragged_masks(24)
        images = [*map(shown, masks)]
        for transform in (
            tree(RGB(), RandomResizedCrop((20, 33)), RandomHorizontalFlip()),
            tree(Resize(40), CenterCrop(32)),
            tree(ResizeToCover((24, 40)), CenterCrop((30, 36))),
            CenterCrop(50),
        ):
            made, moved = transform.with_masks(images, masks, draws(24))
            assert made.shape[2:] == moved.shape[1:]
            for n in range(24):
                one = draws(24).select(torch.tensor([n]))
                assert torch.equal(transform.masks([masks[n]], one)[0], moved[n])
        sizes = [mask.shape for mask in Resize(16).masks(masks, draws(24))]
        assert sizes == [image.shape[1:] for image in Resize(16)(images, draws(24))]

    def test_halves_of_a_chain_give_what_it_gives(self):
        masks = ragged_masks(24)
        images = [*map(shown, masks)]
        whole = tree(RGB(), RandomResizedCrop(24), RandomHorizontalFlip(), RandomAffine(20), RandomErasing(1.0))
        head, tail = whole.split()
        assert len(head.transforms) == 2
        expected = whole.with_masks(images, masks, draws(24))
        for made, wanted in zip(
            tail.with_masks(*head.with_masks(images, masks, draws(24)), draws(24)), expected, strict=True
        ):
            assert torch.equal(made, wanted)

    def test_masks_of_torchvision(self):
        """A mask of torchvision's own class becomes a plain tensor."""
        masks = [tv_tensors.Mask(mask) for mask in random_masks(3, 8, 9)]
        for transform in (tree(Resize(4)), Resize(4), RGB(), RandomHorizontalFlip()):
            assert all(type(mask) is torch.Tensor for mask in transform.masks(masks, draws(3)))


class Turn(BatchTransform):
    """Turns images by a half at random."""

    def transform(self, images, draws):
        return torch.where(draws.coin(0.5).view(-1, 1, 1, 1), images.flip(2, 3), images)


class TurnWithMasks(Turn):
    """Implements what masks need."""

    def transform(self, images, draws):
        return super().transform(images, draws)

    def transform_masks(self, masks, draws):
        return Turn.transform(self, masks[:, None], draws)[:, 0]


class Darker(BatchTransform):
    """Changes colours only."""

    moves_pixels = False

    def transform(self, images, draws):
        return images * draws.uniform().float().view(-1, 1, 1, 1)


class FlipAndMore(RandomHorizontalFlip):
    """Moves other pixels than its base class, whose masks do not fit."""

    def transform(self, images, draws):
        return super().transform(images, draws).flip(2)


class MovingJitter(ColorJitter):
    """Moves pixels, which its base class does not."""

    def transform(self, images, draws):
        return super().transform(images, draws).flip(2)


class OwnChain(Compose):
    """Does more than its parts."""

    def transform(self, images, draws):
        return super().transform(images, draws).flip(2)


class Gentle(RandomHorizontalFlip):
    """Has other arguments than its base class, and the same transform."""

    def __init__(self):
        super().__init__(0.1)


class Undecided(BatchTransform):
    """Moves pixels and has no masks."""

    moves_pixels = True

    def transform(self, images, draws):
        return images


class TestOwnTransforms:
    @pytest.mark.parametrize(
        "transform", [Turn(), FlipAndMore(), MovingJitter(0.1), OwnChain([RandomCrop(4)]), Undecided()], ids=repr
    )
    def test_one_without_masks_is_refused(self, transform):
        masks = random_masks(5, 6, 6)
        message = f"^{type(transform).__name__} must implement transform_masks .* or set moves_pixels = False if it"
        for one in (transform, tree(RandomCrop(6), transform), tree(tree(transform))):
            for call in (
                one.check_masks,
                lambda one=one: one.masks(masks, draws(5)),
                lambda one=one: one.with_masks(shown(masks), masks, draws(5)),
            ):
                with pytest.raises(InputError, match=message) as error:
                    call()
                assert "\n" not in str(error.value)

    def test_one_with_masks(self):
        masks = random_masks(50, 6, 7)
        for transform in (TurnWithMasks(), tree(RandomCrop(6), TurnWithMasks()), Gentle()):
            images, moved = transform.with_masks(shown(masks), masks, draws(50))
            assert torch.equal(moved, read(images, 0))

    def test_one_that_changes_colours(self):
        masks = random_masks(5, 6, 7)
        for transform in (Darker(), tree(Darker())):
            assert torch.equal(transform.with_masks(shown(masks), masks, draws(5))[1], masks)

    def test_other_draws_are_refused(self):
        """Draws that only images use up would move masks by the numbers of another step."""

        class Noisy(TurnWithMasks):
            def transform(self, images, draws):
                return super().transform(images + draws.uniform().float().view(-1, 1, 1, 1), draws)

            def transform_masks(self, masks, draws):
                return super().transform_masks(masks, draws)

        masks = random_masks(5, 6, 7)
        message = "masks of Noisy must make the draws of images, used or not, got 2 numbers for images and 1 for masks"
        for transform in (Noisy(), tree(Darker(), Noisy())):
            with pytest.raises(InputError, match=message):
                transform.with_masks(shown(masks, torch.float32), masks, draws(5))

    def test_other_results_are_refused(self):
        class Wrong(Turn):
            change = staticmethod(lambda masks: masks)

            def transform(self, images, draws):
                return images[:, :, 1:]

            def transform_masks(self, masks, draws):
                return self.change(masks)

        masks = random_masks(5, 6, 7)
        for change, message in (
            (lambda masks: masks, r"masks of Wrong must have .* got \[6, 7\] for an image of \[5, 7\]"),
            (lambda masks: masks[:, 1:].float(), r"masks of Wrong must be .*int64, got \[5, 5, 7\] of torch.float32"),
            (lambda masks: masks[1:, 1:], "masks of Wrong must be one for each image, got 4 for 5 images"),
        ):
            transform = Wrong()
            transform.change = change
            with pytest.raises(InputError, match=message):
                tree(transform).with_masks(shown(masks), masks, draws(5))


@pytest.mark.parametrize("transform", [RandomHorizontalFlip(), RGB(), tree(RGB(), RandomResizedCrop(4))], ids=repr)
def test_other_masks_are_refused(transform):
    masks = random_masks(5, 6, 7)
    for given, message in (
        (masks.to(torch.uint8), r"must be \(B, H, W\) of torch.int64, got \[5, 6, 7\] of torch.uint8"),
        (masks[:, None], r"must be \(B, H, W\) of torch.int64, got \[5, 1, 6, 7\]"),
        ([*masks[:, None]], r"must be a list of \(H, W\) of torch.int64, got \[1, 6, 7\]"),
        ([*masks[:-1], masks[-1].float()], r"must be a list of \(H, W\) of torch.int64, got \[6, 7\] of torch.float32"),
    ):
        for call in (
            lambda given=given: transform.masks(given, draws(5)),
            lambda given=given: transform.with_masks(shown(masks), given, draws(5)),
        ):
            with pytest.raises(InputError, match=message):
                call()
    with pytest.raises(InputError, match="draws must have a row for each of 5 masks, got 4"):
        transform.masks(masks, draws(4))
    with pytest.raises(InputError, match="draws must have a row for each of 5 images, got 4"):
        transform.with_masks(shown(masks), masks, draws(4))
    for images in (shown(masks)[:, :, 1:], [*shown(masks[:-1]), shown(masks)[-1, :, 1:]]):
        with pytest.raises(InputError, match=r"^masks must have the height and width .* got \[6, 7\] for .* \[5, 7\]"):
            transform.with_masks(images, [*masks], draws(5))
    with pytest.raises(InputError, match="^masks must be one for each image, got 5 for 4 images"):
        transform.with_masks(shown(masks)[1:], masks, draws(5))
