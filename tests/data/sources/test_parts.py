"""Labels of map-style datasets: from attributes that agree with the items, else from the items."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from kd_lightning import InputError
from kd_lightning.data.sources._parts import dataset_part, dataset_parts


class Items(Dataset):
    """Items made by a function; the places that were read are recorded."""

    def __init__(self, item, size=40, **attributes):
        self.item = item
        self.size = size
        self.read = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.read.append(index)
        return self.item(index)


def pair(index):
    return Image.new("L", (2, 2), int(index)), index % 3


LABELS = [index % 3 for index in range(40)]
Named = namedtuple("Named", "label image")


def labels_of(dataset):
    return dataset_part(dataset).targets.tolist()


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, np.uint8])
def test_attributes_with_the_labels(name, kind):
    dataset = Items(pair, **{name: kind(LABELS)})
    assert labels_of(dataset) == LABELS
    assert 2 <= len(dataset.read) <= 8  # some items are compared
    assert {0, 39} <= {*dataset.read}


def test_table_columns_are_read_by_place():
    class Series:
        """As a pandas Series whose index is shuffled."""

        def __len__(self):
            return 40

        def __getitem__(self, key):
            raise KeyError(key)

        def tolist(self):
            return LABELS

    assert labels_of(Items(pair, labels=Series())) == LABELS


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": ["ant", "bee", "cow"]},  # names of the classes
        {"labels": dict.fromkeys(range(40), 0)},
        {"labels": lambda: LABELS},
        {"labels": [f"name {index}" for index in range(40)]},
        {"targets": torch.zeros(40, 8, dtype=torch.long)},
        {"targets": None, "labels": 5},
        {"labels": ["ant"] * 40, "_labels": LABELS},
    ],
)
def test_attributes_that_are_no_labels(attributes):
    assert labels_of(Items(pair, **attributes)) == LABELS


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[::-1], r"Items: item \d+ has the label \d, but targets\[\d+\] is \d"),
        ([index % 3 + 1 for index in range(40)], r"Items: item 0 has the label 0, but targets\[0\] is 1"),
        ([*LABELS[:-1], -1], r"item 39 has the label 0, but targets\[39\] is None"),  # a hidden label
        (torch.tensor([*LABELS[:-1], 2]), r"item 39 has the label 0, but targets\[39\] is 2"),
    ],
)
def test_attributes_that_differ_from_the_items(labels, message):
    with pytest.raises(InputError, match=message) as error:
        labels_of(Items(pair, targets=labels))
    assert "\n" not in str(error.value)


def test_an_attribute_of_names_and_items_of_names():
    names = [("cow", "ant", "bee")[label] for label in LABELS]
    parts = dataset_parts(Items(lambda index: (0, names[index]), labels=names), None, None)
    assert parts.class_names == ["ant", "bee", "cow"]
    assert parts.train.targets.tolist() == [(2, 0, 1)[label] for label in LABELS]
    parts = dataset_parts(Items(lambda index: (0, "34"[index % 2])), None, None, [3, 4])
    assert parts.train.targets[:2].tolist() == [0, 1]
    with pytest.raises(InputError, match=r"item 0 has bytes b'cat'"):
        dataset_parts(Items((0, b"cat"), labels=[b"cat"] * 40), None, None)
    with pytest.raises(InputError, match=r"item 0 has the label 'cow', but labels\[0\] is 'ant'"):
        dataset_parts(Items(lambda index: (0, names[index]), labels=["ant"] * 40), None, None)


def test_labels_of_rows():
    rows = torch.eye(3)[torch.tensor(LABELS)]
    assert torch.equal(dataset_part(Items(lambda index: (0, rows[index]), targets=rows.numpy())).targets, rows)
    with pytest.raises(InputError, match="item 0 has the label .1.0, 0.0, 0.0., but"):
        dataset_part(Items(lambda index: (0, rows[index]), targets=1 - rows))
    precise = np.arange(40) / 7
    assert len(dataset_part(Items(lambda index: (0, np.float32(precise[index])), targets=precise)).targets) == 40


class TestTargetTransform:
    @staticmethod
    def dataset(transform, transforms_items=True):
        item = (lambda index: (0, transform(LABELS[index]))) if transforms_items else pair
        return Items(item, targets=LABELS, target_transform=transform)

    def test_is_applied(self):
        dataset = self.dataset(lambda label: 2 - label)
        assert labels_of(dataset) == [2 - label for label in LABELS]
        assert len(dataset.read) <= 8
        assert labels_of(Subset(dataset, [3, 5])) == [2, 0]

    def test_that_the_items_do_not_have(self):
        assert labels_of(self.dataset(lambda label: 2 - label, transforms_items=False)) == LABELS

    def test_to_names(self):
        parts = dataset_parts(self.dataset("abc".__getitem__), None, None)
        assert (parts.class_names, parts.train.targets.tolist()) == (["a", "b", "c"], LABELS)

    def test_that_fails_on_the_attribute(self):
        def transform(label):
            return label["class"]

        dataset = Items(pair, targets=LABELS, target_transform=transform)
        assert labels_of(dataset) == LABELS


class TestSelections:
    def test_subsets_load_no_more_images(self):
        dataset = Items(pair, targets=LABELS)
        subset = Subset(Subset(dataset, range(30, 10, -1)), [0, 5, 19])
        assert labels_of(subset) == [LABELS[30], LABELS[25], LABELS[11]]
        assert {*dataset.read} == {30, 25, 11}

    def test_random_split(self):
        dataset = Items(pair, size=40, targets=np.array(LABELS))
        for part in random_split(dataset, [30, 10], torch.Generator().manual_seed(0)):
            assert labels_of(part) == [LABELS[index] for index in part.indices]
        assert len(dataset.read) <= 16

    def test_subset_without_an_attribute_reads_its_own_items(self):
        dataset = Items(pair)
        assert labels_of(Subset(dataset, np.array([4, 2]))) == [1, 2]
        assert dataset.read == [4, 2]

    def test_joined_datasets(self):
        first, second = Items(pair, targets=LABELS), TensorDataset(torch.rand(2, 3), torch.tensor([2, 0]))
        third = Items(pair, 4)
        assert labels_of(ConcatDataset([first, second, third])) == [*LABELS, 2, 0, *LABELS[:4]]
        assert len(first.read) <= 8
        assert labels_of(Subset(ConcatDataset([first, second]), [41, 1])) == [0, 1]
        tensors = ConcatDataset([second, second])
        assert labels_of(tensors) == [2, 0, 2, 0]

    def test_a_subset_with_items_of_its_own(self):
        class Shifted(Subset):
            def __getitem__(self, index):
                image, label = super().__getitem__(index)
                return image, label + 10

            __getitems__ = None

        with pytest.raises(InputError, match=r"Shifted: item 0 has the label 10, but targets\[0\] is 0"):
            labels_of(Shifted(Items(pair, targets=LABELS), [0, 1]))
        assert labels_of(Shifted(Items(pair), [0, 1])) == [10, 11]


@pytest.mark.parametrize(
    "item",
    [
        lambda index: (0, index % 3, "more"),
        lambda index: [0, np.int32(index % 3)],
        lambda index: (0, torch.tensor(index % 3, dtype=torch.uint8)),
        lambda index: (0, np.array([index % 3])),
        lambda index: Named(index % 3, 0),
        lambda index: {"image": 0, "label": index % 3, "id": 99},
        lambda index: {"pixel_values": 0, "labels": torch.tensor(index % 3)},
        lambda index: {"img": 0, "fine_label": index % 3, "coarse_label": 0},
    ],
)
def test_labels_of_items(item):
    assert labels_of(Items(item)) == LABELS


def test_items_without_labels():
    found = labels_of(Items(lambda index: (0, [None, -1, -100, float("nan"), 1, 0][index]), 6))
    assert found == [-100] * 4 + [1, 0]
    for image in (torch.rand(3, 4, 4), Image.new("L", (2, 2))):
        with pytest.raises(InputError, match=f"item 0 of Items must be .image, label.*got {type(image).__name__}"):
            labels_of(Items(lambda index, image=image: image))
    with pytest.raises(InputError, match="Items: a label must be .* item 0 has Image"):
        labels_of(Items(lambda index: [Image.new("L", (2, 2))] * 2))


def test_broken_items_are_not_needed_for_the_labels():
    def broken(index):
        raise OSError("broken")

    assert labels_of(Items(broken, targets=LABELS)) == LABELS
    with pytest.raises(InputError, match="item 0 of Items cannot be read: OSError: broken"):
        labels_of(Items(broken))


def test_the_comparison_draws_no_random_numbers():
    def item(index):
        return torch.rand(1) + np.random.rand() + random.random(), index % 3

    states = []
    for count in (0, 1):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        for _ in range(count):
            labels_of(Items(item, targets=LABELS))
        states.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (["b", None, "a"], None, [1, -100, 0]),
        (["b", None, "a"], "string", [1, -100, 0]),
        (["b", None, "a"], "category", [1, -100, 0]),
        ([5, None, 3], "Int64", [5, -100, 3]),
        ([5, None, 3], object, [5, -100, 3]),
        ([True, False, True], None, [1, 0, 1]),
    ],
)
def test_columns_of_pandas(values, dtype, expected):
    labels = pytest.importorskip("pandas").Series(values, index=[2, 1, 0], dtype=dtype)
    dataset = Items(lambda index: (0, labels.iloc[index]), 3)
    assert labels_of(dataset) == expected
    dataset.read.clear()
    dataset.labels = labels
    assert dataset_parts(dataset, None, None).train.targets.tolist() == expected
    assert dataset.read == [0, 1, 2]  # once, to compare
