"""Image and label of an item."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from kd_lightning import InputError
from kd_lightning.data.sources.images import path_of, read_image
from kd_lightning.data.sources.items import IMAGE_KEYS, LABEL_KEYS, image_of, label_of

Named = namedtuple("Named", "number label image")
Other = namedtuple("Other", "pixels category extra")


@pytest.mark.parametrize(
    "item",
    [
        ("image", 3),
        ["image", 3],
        ("image", 3, "more", 7),
        Named(9, 3, "image"),
        Other("image", 3, None),
        OrderedDict(label=3, image="image", id=8),
        *({key: "image", "label": 3} for key in IMAGE_KEYS),
        *({"img": "image", key: 3, "coarse_label": 1} for key in LABEL_KEYS),
    ],
)
def test_labeled_items(item):
    assert (image_of(item, "item 4"), label_of(item, "item 4")) == ("image", 3)


def test_images_alone():
    image = torch.rand(3, 2, 2)
    for item in (image, (image,), [image], {"x": image}):
        assert image_of(item, "item 4") is image
    array = np.zeros((2, 2))
    assert image_of(array, "") is array


@pytest.mark.parametrize(
    ("item", "got"),
    [
        (torch.rand(3, 2, 2), "got Tensor"),  # not its second channel
        (np.zeros((3, 2)), "got ndarray"),
        (("image",), "got tuple of length 1"),
        ("text", "got str"),
        ({"image": 1, "class": 2}, "the keys image, class"),
        ({"image": 1, "label": 2, "target": 3}, "got label and target"),
        ({}, "the keys none"),
    ],
)
def test_items_without_a_label(item, got):
    with pytest.raises(InputError, match=rf"item 4 must be \(image, label\).*label, labels, target.*{got}"):
        label_of(item, "item 4")


@pytest.mark.parametrize(
    ("item", "got"),
    [
        ((), "empty tuple"),
        ({"picture": 1, "label": 2}, "the keys picture, label"),
        ({"x": 1, "image": 2}, "image and x"),
    ],
)
def test_items_without_an_image(item, got):
    with pytest.raises(InputError, match=f"item 1 of list must be .*image, img, x.*{got}"):
        read_image([[0], [0, item]], 2)


def test_paths_of_joined_datasets():
    class Files(torch.utils.data.Dataset):
        def __init__(self, *paths):
            self.paths = [*paths]

        def __len__(self):
            return len(self.paths)

    joined = torch.utils.data.ConcatDataset([Files("a.png", "b.png"), Files("c.png")])
    assert [path_of([joined], number) for number in range(3)] == ["a.png", "b.png", "c.png"]
    assert path_of([torch.utils.data.Subset(joined, [2, 0])], 0) == "c.png"
