"""Dense labels of any kind of dataset in one form, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from kd_lightning import DatasetSource, InputError
from kd_lightning.data.sources.dense_labels import LabelRules, dense_part, read_labeled

GRID = [[0, 1, 2], [2, 1, 0]]


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def palette():
    image = Image.new("P", (3, 2))
    image.putpalette([9, 8, 7] * 3)
    image.putdata([0, 1, 2, 2, 1, 0])
    return image


@pytest.mark.parametrize(
    "label",
    [
        torch.tensor(GRID),
        torch.tensor(GRID, dtype=torch.uint8)[None],
        np.array(GRID, dtype=">i2"),
        np.array(GRID)[:, ::-1][:, ::-1],
        GRID,
        tuple(map(tuple, GRID)),
        Image.fromarray(np.array(GRID, dtype=np.uint8)),
        Image.fromarray(np.array(GRID, dtype=np.uint16)),
        palette(),
    ],
)
def test_class_numbers(label):
    found = LabelRules(3).convert(label, "item 0")
    assert found.dtype == torch.int64
    assert found.tolist() == GRID


def test_missing_ones():
    rules = LabelRules(3, void=255)
    label = torch.tensor([[255, 1], [2, 156]], dtype=torch.uint8)
    assert LabelRules(None, 255).convert(label, "").tolist() == [[-100, 1], [2, 156]]  # -100 is 156 modulo 256
    assert rules.convert(torch.tensor([-1, -100, 255, 2]), "").tolist() == [-100, -100, -100, 2]
    assert rules.convert(None, "") is None
    values = LabelRules().convert(np.array([[0.5, np.nan]], dtype=np.float64), "")
    assert values.dtype == torch.float32 and values.isnan().tolist() == [[False, True]]
    assert LabelRules().convert(torch.tensor([[True, False]]), "").tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "item 7 must|item 7 has"),
        (torch.tensor(3), "dense: item 7 must have a label for each position"),
        (torch.zeros(0), "dense: item 7 must have a label for each position"),
        (torch.tensor([0, 3]), r"there are 3 names, and item 7 has class 3 \(classes count from 0\)$"),
        (torch.tensor([0, 255]), "void: 255 leaves out positions of 255$"),
        (torch.tensor([0, -2]), "labels must be class numbers 0, 1, ..., or -1 or -100 for none, but item 7 has -2"),
        (Image.new("RGB", (2, 2)), "but item 7 has a colour picture of mode RGB"),
        ([[0, 1], [2]], "dense: labels of item 7 must be numbers of one shape"),
        (["a", "b"], "dense: labels must be numbers, but item 7 has"),
        ("a", "dense: labels must be numbers, but item 7 has str 'a'"),
        (torch.zeros(2, dtype=torch.complex64), "dense: labels must be numbers, but item 7 has Tensor"),
    ],
)
def test_what_is_refused(label, message):
    with pytest.raises(InputError, match=message) as caught:
        LabelRules(3).convert(label, "item 7")
    assert "\n" not in str(caught.value)


def test_which_samples_have_labels():
    image = torch.rand(3, 2, 3)
    items = Items(
        (image, torch.tensor(GRID)),
        {"image": image, "mask": None},
        {"image": image, "mask": np.array(GRID)},
        {"pixel_values": image, "labels": torch.full((2, 3), -100)},
        (image, GRID, "more"),
        (image, image),  # an image to image task: no two inputs
    )
    part = dense_part(items, LabelRules())
    assert part.dense
    assert part.targets.tolist() == [0, -100, 0, -100, 0, 0]
    assert part.label_contents[0] == part.label_contents[2] == part.label_contents[4] != part.label_contents[5]
    for index in (0, 2, 4):
        for pixels in (False, True):
            found, label = read_labeled([items], index, LabelRules(), visible=True, as_pixels=pixels)
            assert torch.equal(found, image) and label.tolist() == GRID
            assert read_labeled([items], index, LabelRules(), visible=False, as_pixels=pixels)[1] is None
    with pytest.raises(InputError, match="item 0 of Items must be"):
        dense_part(Items(image), LabelRules())
    with pytest.raises(InputError, match="item 1 of Items has class 2"):
        DatasetSource(Items((image, [[0]]), (image, GRID)), dense=True, class_names=["a", "b"]).load()


def test_a_mask_beside_an_image_is_not_left_out(caplog):
    with caplog.at_level("INFO"):
        DatasetSource(Items({"image": Image.new("L", (3, 2)), "mask": torch.tensor(GRID)}), dense=True)
    assert "left out" not in caplog.text


def test_names_of_the_classes():
    class Named(Items):
        classes = ("a", "b", "c")

    items = Named((torch.rand(3, 2, 3), torch.tensor(GRID)))
    assert DatasetSource(items, dense=True).load().class_names == ["a", "b", "c"]
    assert DatasetSource(items, dense=True, void=2).load().void == 2
