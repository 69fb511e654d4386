"""Class names: of datasets, as labels, and between training and test."""

import math
import unicodedata

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from kd_lightning import InputError
from kd_lightning.data.sources.class_names import class_names_of, number_names, renumber_classes

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def with_classes(classes):
    dataset = TensorDataset(torch.rand(2, 1), torch.arange(2))
    dataset.classes = classes
    return dataset


def test_names_of_a_dataset_and_of_what_selects_from_it():
    cats, dogs, nameless = with_classes(["cat", 3]), with_classes(("dog",)), TensorDataset(torch.rand(2, 1))
    assert class_names_of(Subset(Subset(cats, [1, 0]), [0])) == ["cat", "3"]
    assert class_names_of(ConcatDataset([cats, Subset(cats, [0])])) == ["cat", "3"]
    assert class_names_of(nameless) is class_names_of(ConcatDataset([cats, nameless])) is None
    assert class_names_of(with_classes("cat")) is None
    with pytest.raises(InputError, match="same classes, got .'cat', '3'. and .'dog'."):
        class_names_of(ConcatDataset([cats, dogs]))


def test_labels_that_are_names():
    labels = [NFD, "dog", None, " dog", math.nan, "", NFC]
    assert number_names(labels, None, "X") == ([0, 1, -100, 1, -100, -100, 0], [NFC, "dog"])
    assert number_names(labels, ["dog", NFD], "X") == ([1, 0, -100, 0, -100, -100, 1], ["dog", NFD])


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["cat", "cow"], ["cat", "dog"], "X: item 1 has the class 'cow', none of cat, dog"),
        (["cat", 1], None, "X: labels must all be texts or all be numbers, but item 1 has 1"),
        (["cat", "dog"], ["dog", "dog", "cat"], "item 1 has the class 'dog', a name of two of dog, dog, cat"),
    ],
)
def test_names_that_are_no_classes(labels, names, message):
    with pytest.raises(InputError, match=message):
        number_names(labels, names, "X")


@pytest.mark.parametrize(
    ("theirs", "names", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"], [0, -100, 1]),
        (["cat", "dog"], ["ant", "cat", "cow", "dog"], [1, -100, 3]),  # two classes have no test sample
        (["dog", "cat"], ["cat", "dog"], [1, -100, 0]),
        (["cat", "dog", "emu"], ["dog", "cat"], [1, -100, 0]),  # no test sample is an emu
        ([NFD, "dog"], ["ant", NFC, "dog"], [1, -100, 2]),
    ],
)
def test_test_classes_by_name(theirs, names, expected):
    assert renumber_classes(torch.tensor([0, -100, 1]), theirs, names).tolist() == expected


@pytest.mark.parametrize(
    ("targets", "theirs", "names", "message"),
    [
        (
            [0, 1],
            ["cat", "emu"],
            ["cat", "dog"],
            "test: its class 'emu' is none of the training part's classes, cat, d",
        ),
        ([0, 2], ["dog", "cat"], ["cat", "dog"], "test: its class 2 is none"),
        ([[0, 1]], ["b", "a"], ["a", "b"], "test: its classes must be those of the training part, a, b, got b, a"),
        ([0], ["a", "a"], ["a", "b"], "test: its classes must be"),
    ],
)
def test_classes_that_training_lacks(targets, theirs, names, message):
    with pytest.raises(InputError, match=message):
        renumber_classes(torch.tensor(targets), theirs, names)
