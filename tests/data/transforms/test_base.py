"""Whole-batch transforms and chains of them."""

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.transforms import (
    RGB,
    BatchTransform,
    CenterCrop,
    Compose,
    Draws,
    Normalize,
    RandomCrop,
    Resize,
    ResizeToCover,
)


class Shift(BatchTransform):
    """Adds a random number to each image."""

    def transform(self, images, draws):
        return images + draws.uniform().float().reshape(-1, 1, 1, 1)


class Corner(BatchTransform):
    """The upper left 4x4 pixels of each image, shifted."""

    takes_lists = True

    def transform(self, images, draws):
        corner = torch.stack([image[:, :4, :4] for image in images])
        return corner + draws.uniform().float().reshape(-1, 1, 1, 1)


def rows(count, seed=0):
    index = torch.arange(count)
    return Draws(seed, index, torch.zeros_like(index))


def test_a_part_has_random_numbers_of_its_own():
    x = torch.rand(5, 1, 6, 6)
    made = Compose([Shift(), v2.Normalize([0.5], [0.25]), Shift()])(x, rows(5))
    first, last = (rows(5).stream(number).uniform().float().reshape(-1, 1, 1, 1) for number in (0, 2))
    assert torch.equal(made, (x + first).sub(0.5).div(0.25) + last)
    assert torch.equal(Compose([Shift(), nn.Sequential()][:1])(x, rows(5)), x + first)


def test_chains_in_chains():
    x = torch.rand(5, 1, 6, 6)
    inner = Compose([Shift(), Shift()])
    expected = x + sum(rows(5).stream(1).stream(n).uniform().float().reshape(-1, 1, 1, 1) for n in range(2))
    assert torch.allclose(Compose([v2.Identity(), inner])(x, rows(5)), expected)


def test_halves_of_a_chain_give_what_it_gives():
    images = [torch.rand(1, 5 + n, 9 - n) for n in range(4)]
    whole = Compose([Corner(), Shift(), Shift()])
    head, tail = whole.split()
    assert [len(head.transforms), len(tail.transforms)] == [1, 2]
    assert torch.equal(tail(head(images, rows(4)), rows(4)), whole(images, rows(4)))
    again = tail.split()[1]
    assert torch.equal(again(head(images, rows(4)), rows(4)), whole(images, rows(4)))
    assert len(Compose([Shift()]).split()[0].transforms) == 0


@pytest.mark.parametrize(
    "part", [v2.RandomHorizontalFlip(), v2.RandomCrop(4), nn.ReLU(), v2.Lambda(abs), v2.Compose([v2.Identity()])]
)
def test_other_transforms_are_refused(part):
    with pytest.raises(InputError, match=f"whole-batch transforms.*{type(part).__name__}"):
        Compose([Shift(), part])


def test_one_image():
    """Without random numbers of its own, an image gets them from torch's global generator."""
    picture = Image.new("L", (6, 4), 200)
    torch.manual_seed(3)
    made = [Compose([v2.ToDtype(torch.float32, scale=True), Shift()])(picture) for _ in range(2)]
    torch.manual_seed(3)
    again = Compose([v2.ToDtype(torch.float32, scale=True), Shift()])(picture)
    assert made[0].shape == (1, 4, 6) and type(made[0]) is torch.Tensor
    assert torch.equal(made[0], again) and not torch.equal(made[0], made[1])
    tensor = torch.rand(1, 4, 6)
    assert Shift()(tensor).shape == (1, 4, 6)


def test_images_of_different_sizes():
    images = [torch.zeros(3, 5, 5), torch.zeros(3, 5, 6)]
    with pytest.raises(InputError, match=r"one shape.*\(3, 5, 5\), \(3, 5, 6\)"):
        Shift()(images, rows(2))
    with pytest.raises(InputError, match="float32.*uint8"):
        Shift()([images[0], images[0].byte()], rows(2))
    assert Corner()(images, rows(2)).shape == (2, 3, 4, 4)
    assert Shift()([images[0]] * 3, rows(3)).shape == (3, 3, 5, 5)


def test_torchvision_changes_each_image_of_a_list():
    """torchvision itself changes the first tensor of a list alone."""
    images = [*torch.randint(0, 256, (3, 3, 6, 5), generator=torch.Generator().manual_seed(0)).byte()]
    made = Compose([RGB(), v2.ToDtype(torch.float32, scale=True), v2.Resize(4)])(images, rows(3))
    floats = v2.functional.to_dtype(torch.stack(images), torch.float32, scale=True)
    assert torch.equal(made, v2.functional.resize(floats, [4]))
    with pytest.raises(InputError, match="images of a batch must have one shape and type"):
        Compose([RGB(), v2.Resize(4)])([images[0], images[1][:, 1:]], rows(2))


def test_arguments_are_shown():
    """A run's files and error messages hold the text of a transform."""
    made = Compose([RandomCrop(8, padding=2), Normalize([0.5], [0.25])])
    text = repr(made)
    assert "padding" in text and "mean=[0.5], std=[0.25]" in text and "training" not in text


def test_draws_of_other_rows():
    with pytest.raises(InputError, match="draws.*5 images, got 1"):
        Shift()(torch.rand(5, 1, 6, 6), rows(1))


def test_generators_are_left_alone_by_what_is_not_random():
    """An evaluation transform in a chain of torchvision's does not move torch's generator."""
    picture = Image.new("RGB", (12, 10), "red")
    evaluation = Compose([RGB(), Resize(8), CenterCrop(6), Normalize([0.5], [0.25])])
    state = torch.get_rng_state()
    v2.Compose([evaluation, ResizeToCover(9)])(picture)
    assert torch.equal(torch.get_rng_state(), state)
    assert not evaluation.is_random and Compose([RandomCrop(8), evaluation]).is_random
    Compose([RandomCrop(8)])(picture)
    assert not torch.equal(torch.get_rng_state(), state)
