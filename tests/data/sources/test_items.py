"""Image and label of an item."""

from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_lightning import InputError
from kd_lightning.data.sources.images import path_of, read_image
from kd_lightning.data.sources.items import (
    IMAGE_KEYS,
    LABEL_KEYS,
    Entries,
    content_of,
    image_of,
    label_of,
    left_out,
    picture_of,
)

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
    with pytest.raises(InputError, match=rf"item 4 must be \(image, label\).*labels, label, target.*{got}"):
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


IDS, MASK, PICTURE = torch.arange(3), torch.ones(3), Image.new("L", (2, 2))
Parts = namedtuple("Parts", "input_ids attention_mask label")
Pair = namedtuple("Pair", "picture label")


@pytest.mark.parametrize(
    ("item", "names", "label"),
    [
        ({"input_ids": IDS, "attention_mask": MASK, "labels": 2}, ["input_ids", "attention_mask"], 2),
        ({"x": IDS, "input": MASK, "y": 2}, ["x", "input"], 2),
        ({"pixel_values": PICTURE, "teacher_inputs": PICTURE, "label": 2}, ["pixel_values", "teacher_inputs"], 2),
        ({"image": torch.ones(1, 2, 2), "tokens": IDS, "label": 2}, ["image", "tokens"], 2),
        ({"text": "words", "label": 2}, ["text"], 2),
        ({"tokens": IDS, "padding": MASK, "mask": 2}, ["tokens", "padding"], 2),
        ({"tokens": IDS, "mask": MASK, "label": 2}, ["tokens", "mask"], 2),
        (Parts(IDS, MASK, 2), ["input_ids", "attention_mask"], 2),
    ],
)
def test_entries_of_an_item(item, names, label):
    inputs = image_of(item, "")
    assert isinstance(inputs, Entries)
    assert [*inputs] == names
    assert label_of(item, "") == label


@pytest.mark.parametrize(
    "item",
    [
        {"image": PICTURE, "boxes": IDS, "label": 2},
        {"image": PICTURE, "img_id": torch.tensor(3), "label": 2},
        {"picture": PICTURE, "label": 2},
        Pair(PICTURE, 2),
        (PICTURE, 2),
    ],
)
def test_one_picture_stands_alone(item):
    assert image_of(item, "") is PICTURE
    assert label_of(item, "") == 2


def test_several_inputs_of_a_pair_stay_as_they_are():
    for inputs in ({"a": IDS, "b": MASK}, (IDS, MASK)):
        assert image_of((inputs, 2), "") is inputs
        assert label_of((inputs, 2), "") == 2


@pytest.mark.parametrize("item", [(IDS, IDS, 2), (np.ones((2, 3)), np.ones((2, 3))), (IDS, MASK.long(), MASK, 3)])
def test_two_inputs_are_no_pair(item):
    with pytest.raises(InputError, match=r"item 4 begins with .* of one kind, .*; return \(\(a, b\), label\)"):
        label_of(item, "item 4")
    label_of((torch.ones(3, 4, 4), torch.ones(4, 4), 1), "item 4")
    label_of((torch.ones(4), torch.ones(4)), "item 4")
    label_of((IDS, IDS), "item 4")


def test_content_has_no_places():
    one = {"text": "words", "path": "/a/b", "file_name": "b", "place": Path("x"), "idx": 3, "index": torch.tensor(3)}
    other = {"place": Path("y"), "path": "/b/c", "file_name": "c", "index": torch.tensor(9), "idx": 7, "text": "words"}
    assert content_of(one) == content_of(other) == {"text": "words"}
    assert content_of({"text": "words", "id": 4}) != content_of(one)
    assert content_of(({"b": 1, "a": 2}, 3)) == ({"a": 2, "b": 1}, 3)
    assert [*content_of({"b": 1, "a": 2})] == ["a", "b"]
    assert content_of(PICTURE) is PICTURE


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ({"image": PICTURE, "boxes": IDS, "tags": ["a"], "id": 3, "text": "words", "label": 1}, ["boxes", "tags"]),
        ({"inputs": {"a": IDS}, "more": IDS, "label": 1}, ["more"]),
        ({"image": IDS, "boxes": MASK, "label": 1}, []),
        ({"image": PICTURE, "label": IDS}, []),
        ((PICTURE, 1, IDS), []),
    ],
)
def test_what_is_left_out(item, names):
    assert left_out(item) == names


def test_picture_among_inputs():
    assert picture_of({"image": PICTURE, "tokens": IDS}) is PICTURE
    for inputs in ({"a": IDS, "b": MASK}, {"x": IDS, "image": PICTURE}, IDS, (PICTURE, IDS)):
        assert picture_of(inputs) is inputs
