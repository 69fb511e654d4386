"""Label rows of a split file are checked where the classes are known."""

from dataclasses import replace

import pytest
import torch

from kd_lightning.batch import LabelKind
from kd_lightning.data.labels.build import build_labels, check_label_rows
from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_noise import PairNoise
from kd_lightning.data.sources.source import Part, Parts
from kd_lightning.data.splits import Split, make_split
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
    assert check_label_rows(split, parts, unlabeled_part=True) is None


class TestSamplesWithoutALabelInTheSource:
    """-100 is the last class but 99 where it serves as an index."""

    CLASSES = 120
    TRUTH = torch.tensor([*range(CLASSES), -100, -100, -100, -100])
    SPLIT = Split(labeled=[*range(60)], unlabeled=[*range(60, CLASSES + 4)], val=[], seed=0, data="")

    def test_coarse(self):
        coarse = CoarseLabels({"low": [*range(100)], "high": [*range(100, self.CLASSES)]})
        table = build_labels(self.TRUTH, self.SPLIT, len(self.TRUTH), coarse=coarse)
        assert table.kind[60 : self.CLASSES].eq(LabelKind.COARSE).all()
        assert table.kind[self.CLASSES :].eq(LabelKind.MISSING).all()
        assert table.group[100 : self.CLASSES].eq(1).all() and table.group[60:100].eq(0).all()

    def test_noise(self):
        table = build_labels(self.TRUTH, self.SPLIT, len(self.TRUTH), noise=PairNoise(1.0))
        assert table.visible[:60].tolist() == [*range(1, 61)]
        assert table.visible[60:].eq(-100).all() and table.kind[60:].eq(LabelKind.MISSING).all()
        noisy = PairNoise(1.0).sample(self.TRUTH, self.CLASSES, seed=0)
        assert noisy.tolist() == [*range(1, self.CLASSES), 0, -100, -100, -100, -100]

    def test_same_draws_as_without_them(self):
        """Of samples that have a label."""
        coarse = CoarseLabels({"low": [*range(100)], "high": [*range(100, self.CLASSES)]}, fraction=0.5)
        tables = [
            build_labels(truth, self.SPLIT, len(truth), coarse=coarse)
            for truth in (self.TRUTH, self.TRUTH.clamp_min(0))
        ]
        assert torch.equal(tables[0].kind[: self.CLASSES], tables[1].kind[: self.CLASSES])

    def test_labeled_by_a_row(self):
        row = [self.CLASSES, 7, "clean", 1.0]
        table = build_labels(self.TRUTH, self.SPLIT.with_label_rows([row]), len(self.TRUTH))
        assert table.visible[self.CLASSES] == 7 and table.visible[self.CLASSES + 1] == -100


def test_superclass_in_another_unicode_form():
    split = Split([0, 1], [2], [], 0, "", label_rows=[[2, "de\u0301", "coarse", 1.0]])
    coarse = CoarseLabels({"x": ["a"], "d\u00e9": ["b"]}, fraction=0)
    table = build_labels(torch.tensor([0, 1, 1]), split, 3, coarse=coarse, class_names=["a", "b"])
    assert table.group[2] == 1


def test_source_without_any_label():
    """Its classes are those of the names, and all labels come from rows."""
    truth, names = torch.full((3,), -100), ["a", "b", "c"]
    split = Split([], [0, 1, 2], [], 0, "").with_label_rows([[2, 1, "clean", 1.0]])
    table = build_labels(truth, split, 4, noise=PairNoise(1.0), class_names=names)
    assert table.visible.tolist() == [-100, -100, 1, -100]
    assert build_labels(truth, Split([], [0, 1, 2], [], 0, ""), 3, noisy=True).visible.eq(-100).all()
    parts = Parts(Part([0] * 3, truth), class_names=names)
    check_label_rows(split, parts, unlabeled_part=False)
    with pytest.raises(InputError, match="sample 2 must have .*got 1"):
        check_label_rows(split, parts._replace(class_names=None), unlabeled_part=False)
