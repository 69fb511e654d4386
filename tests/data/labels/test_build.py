"""Label rows of a split file are checked where the classes are known."""

from dataclasses import replace

import pytest
import torch

from kd_lightning.data.labels.build import check_label_rows
from kd_lightning.data.sources.source import Part, Parts
from kd_lightning.data.splits import make_split
from kd_lightning.errors import InputError

TARGETS = torch.arange(30) % 3


@pytest.fixture
def parts():
    return Parts(Part(torch.zeros(30, 1, 2, 2), TARGETS), None, class_names=["a", "b", "c"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([4, 99, "clean", 1.0], "sample 4 must have a class 0 ... 2, got 99"),
        ([4, -1, "noisy", 1.0], "sample 4 must have a class 0 ... 2, got -1"),
        ([4, True, "clean", 1.0], "sample 4 must have a class 0 ... 2, got True"),
        ([4, "a", "clean", 1.0], "sample 4 must have a class 0 ... 2, got 'a'"),
        ([4, 1, "good", 1.0], "sample 4 must have one of the kinds clean, noisy, coarse, missing, got 'good'"),
        ([4, 1, ["clean"], 1.0], r"sample 4 must have one of the kinds .*, got \['clean'\]"),
        ([4, 1, "coarse", 1.0], "sample 4 must have the name of a superclass, got 1"),
        ([4, 1, "clean", -1.0], "sample 4 must have a weight of at least 0, got -1.0"),
        ([4, 1, "clean", float("nan")], "sample 4 must have a weight of at least 0, got nan"),
        ([4, 1, "clean", "1"], "sample 4 must have a weight of at least 0, got '1'"),
    ],
)
def test_rows_that_cannot_be(parts, row, message):
    split = replace(make_split(TARGETS, 2, 0.1, seed=0), label_rows=[[3, 1, "clean", 1.0], row])
    with pytest.raises(InputError, match=f"labeled: the label row of {message}"):
        check_label_rows(split, parts, unlabeled_part=True)


@pytest.mark.parametrize("row", [[4, 2, "clean", 0], [4, -1, "missing", 1.0], [4, "low", "coarse", 0.5]])
def test_rows_that_can_be(parts, row):
    split = replace(make_split(TARGETS, 2, 0.1, seed=0), label_rows=[row])
    assert check_label_rows(split, parts, unlabeled_part=True) == split
