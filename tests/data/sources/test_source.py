"""Parts of a source: labels are brought to one form and fit each other, the images and the names."""

import math

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from kd_lightning import InputError
from kd_lightning.data.sources.source import Part, Parts, check_not_empty, check_parts, passed_over

NAN = math.nan


def part(labels, size=None):
    labels = labels if isinstance(labels, torch.Tensor) else torch.tensor(labels)
    return Part([torch.rand(2)] * (len(labels) if size is None else size), labels)


def test_labels_of_a_source_of_ones_own():
    found = check_parts(
        Parts(part(torch.tensor([0, 156], dtype=torch.uint8)), part([[1], [-1], [0]]), class_names=["a"] * 200), "Mine"
    )
    assert (found.train.targets.dtype, found.train.targets.tolist()) == (torch.int64, [0, 156])
    assert found.test.targets.tolist() == [1, -100, 0]
    assert check_parts(found, "Mine").test.targets.tolist() == [1, -100, 0]


def test_class_names_that_are_numbers():
    assert check_parts(Parts(part([0, 1]), class_names=[2024, 2025]), "Mine").class_names == ["2024", "2025"]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([0, 1], [1.0, NAN, -1.0, 0.0], torch.tensor([1, -100, -100, 0])),
        ([0, 3], [3.0, NAN], torch.tensor([3, -100])),
        ([0.0, 1.0], [1, -1, 0], torch.tensor([1.0, NAN, 0.0])),
        ([[0, 1]], [[0.0, -1.0]], torch.tensor([[0.0, NAN]])),
    ],
)
def test_the_test_part_follows_the_training_part(train, test, expected):
    found = check_parts(Parts(part(train), part(test)), "Mine").test.targets
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (Parts(part([0, 1], 3)), "the training part of Mine must have one label for each image, got 2 for 3"),
        (Parts(part([0, 1]), part([0], 2)), "the test part of Mine must have one label for each image, got 1 for 2"),
        (Parts(part([0, -2])), "the training part of Mine: labels must be .*item 1 has -2"),
        (Parts(part([0, 1]), part([0, -7])), "the test part of Mine: labels must be .*item 1 has -7"),
        (Parts(part([0, 1]), part([[0, 1]])), r"the test part of Mine: its labels must have the shape .*'N', 2"),
        (
            Parts(part([0, 1]), part([0.0, 0.5])),
            "test part of Mine: labels must be class indices, but item 1 has 0.5",
        ),
        (
            Parts(part([0, 2, 1]), class_names=["a", "b"]),
            "class_names must name all classes, but there are 2 names, and item 1 of train has class 2",
        ),
        (Parts(part([0]), part([0, 9]), class_names=["a", "b"]), "item 1 of test has class 9"),
        (Parts(part([[0, 1]]), class_names=["a", "b", "c"]), "class_names must name all 2 labels .*got 3"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(InputError, match=message) as error:
        check_parts(parts, "Mine")
    assert "\n" not in str(error.value)


def test_a_part_without_any_label_is_a_part():
    parts = check_parts(Parts(part([-1, -1]), part([-100]), class_names=["a", "b"]), "Mine")
    assert parts.train.targets.tolist() == [-100, -100]
    check_not_empty(parts, "Mine")
    with pytest.raises(InputError, match="test: the test part of Mine is empty"):
        check_not_empty(Parts(part([0]), part([])), "Mine")


def test_what_a_dataset_has_passed_over():
    class Folder(Dataset):
        def __init__(self, count):
            self.passed_over = count

        def __len__(self):
            return 1

    assert passed_over(ConcatDataset([Subset(Folder(3), [0]), Folder(4)])) == 7
    assert passed_over([0]) == 0
