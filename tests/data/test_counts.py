"""Counts of samples by class and part."""

import json
import math

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning import CoarseLabels, DatasetSource, SemiSupervisedDataModule
from kd_lightning.batch import LabelKind
from kd_lightning.data.counts import count_parts, count_samples

NAN = math.nan


def test_classes():
    counts = count_samples(
        torch.tensor([0, 0, -100, 2, -100, -100]),
        torch.tensor([0, 1, 3, 4]),
        torch.tensor([1, 0, -100]),
        torch.tensor([3, 3, -100, 1]),
        ["ant", "bee", "cow", "dog"],
        total=9,
        files_passed_over=7,
    )
    assert [(row.name, row.labeled, row.validation, row.test) for row in counts.rows] == [
        ("ant", 2, 1, 0),
        ("bee", 0, 1, 1),
        ("cow", 1, 0, 0),
        ("dog", 0, 0, 2),
    ]
    assert str(counts).splitlines() == [
        "class            labeled  unlabeled  validation  test",
        "ant                    2                      1     0",
        "bee                    0                      1     1",
        "cow                    1                      0     0",
        "dog                    0                      0     2",
        "samples                3          1           3     4",
        "without a label                               1     1",
        "labeled: 0 (bee) to 2 (ant) of a class",
        "not used: 2",
        "passed over, since they are no samples: 7",
    ]


def test_file(tmp_path):
    counts = count_samples(torch.tensor([1, 0, 1]), torch.arange(3), torch.tensor([], dtype=torch.long))
    counts.save(tmp_path / "samples.json")
    found = json.loads((tmp_path / "samples.json").read_text())
    assert found == counts.to_dict()
    assert found["classes"] == [
        {"name": "0", "labeled": 1, "validation": 0, "test": None},
        {"name": "1", "labeled": 2, "validation": 0, "test": None},
    ]
    assert found["samples"]["labeled"] == 3
    assert found["samples"]["test"] is None
    assert str(counts).splitlines()[-1].split() == ["samples", "3", "0", "0"]


def test_hidden_labels_are_not_counted_by_class():
    """Only the labels that training may see go in."""
    visible = torch.tensor([0, -100, -100, 1])
    found = json.dumps(count_samples(visible, torch.arange(4), torch.tensor([0])).to_dict()["classes"])
    assert "unlabeled" not in found


def test_many_classes():
    labels = torch.cat([torch.arange(100), torch.zeros(30, dtype=torch.long)])
    lines = str(count_samples(labels, torch.arange(130), torch.tensor([99, 50]), torch.tensor([30]))).splitlines()
    assert len(lines) == 1 + 19 + 1 + 1 + 1
    assert lines[20].split() == ["81", "more", "classes", "81", "2", "1"]
    assert lines[-1] == "labeled: 1 (1) to 31 (0) of a class"
    assert len(str(count_samples(torch.arange(20), torch.arange(20), labels[:1])).splitlines()) == 22


@pytest.mark.parametrize(("most", "shown"), [(10, False), (11, True)])
def test_sizes_that_differ_much_are_shown(most, shown):
    labels = torch.tensor([0] * most + [1])
    text = str(count_samples(labels, torch.arange(len(labels)), labels, class_names=["many", "few"]))
    assert ("labeled: 1 (few) to 11 (many) of a class" in text) == shown


def test_several_labels():
    """Samples with each label; a sample may have several, or none of them."""
    visible = torch.tensor([[1, 0], [1, 1], [NAN, 1], [NAN, NAN], [0, 0]])
    counts = count_samples(
        visible, torch.arange(5), torch.tensor([[1, 0]]), torch.tensor([[NAN, NAN]]), ["red", "round"]
    )
    assert [(row.name, row.labeled, row.validation, row.test) for row in counts.rows] == [
        ("red", 2, 1, 0),
        ("round", 2, 0, 0),
    ]
    assert (counts.labeled, counts.unlabeled, counts.validation, counts.test_without_label) == (4, 1, 1, 1)


@pytest.mark.parametrize(
    ("labels", "names", "rows"),
    [
        ([0.0, 1.0, NAN, 1.0], ["no", "yes"], [("no", 1), ("yes", 2)]),
        ([1.0, 1.0], None, [("0", 0), ("1", 2)]),
        ([0.5, 1.0, -3.0], None, []),
        ([NAN, NAN], None, [("0", 0), ("1", 0)]),
    ],
)
def test_floats(labels, names, rows):
    labels = torch.tensor(labels)
    counts = count_samples(labels, torch.arange(len(labels)), labels[:0], class_names=names)
    assert [(row.name, row.labeled) for row in counts.rows] == rows
    assert counts.labeled + counts.unlabeled == len(labels)


def test_several_values_of_regression_have_no_classes():
    train = torch.tensor([[0.5, -2.0], [NAN, 1.0], [NAN, NAN]])
    counts = count_samples(train, torch.arange(3), train[:2])
    assert counts.rows == []
    assert (counts.labeled, counts.unlabeled, counts.validation) == (2, 1, 2)


def test_no_label_at_all():
    counts = count_samples(torch.full((3,), -100), torch.arange(3), torch.tensor([], dtype=torch.long))
    assert (counts.rows, counts.unlabeled) == ([], 3)
    assert "samples" in str(counts)


@pytest.mark.parametrize(
    ("unlabeled", "expected"),
    [("rest", (8, 6, 0, 3)), ("none", (8, 0, 6, 3)), ("source", (8, 5, 6, 7)), ("test", (8, 4, 6, 3))],
)
def test_of_a_datamodule(tmp_path, unlabeled, expected):
    """18 training images, 2 of them without a label, 4 of the test, and 5 unlabeled ones."""
    labels = torch.tensor([0, 1] * 8 + [-1, -1])
    parts = {"train": labels, "test": torch.tensor([0, 1, 1, -1]), "unlabeled": torch.zeros(5)}
    datasets = {name: TensorDataset(torch.rand(len(y), 1, 2, 2), y) for name, y in parts.items()}
    for name, count in (("train", 1), ("test", 2), ("unlabeled", 4)):
        datasets[name].passed_over = count
    data = SemiSupervisedDataModule(
        DatasetSource(**datasets, class_names=["a", "b"]), labeled=4, val_size=2, unlabeled=unlabeled
    )
    train = data.train_dataloader().dataset.indices
    counts = count_parts(data.samples, data.split, data._labels, train)
    if unlabeled in ("rest", "none"):  # the source's unlabeled part is not used, but may be labeled by a file
        expected = (*expected[:2], expected[2] + 5, 7)
    assert (counts.labeled, counts.unlabeled, counts.unused, counts.passed_over) == expected
    assert (counts.validation, counts.test, counts.test_without_label) == (4, 4, 1)
    assert [(row.name, row.labeled, row.validation, row.test) for row in counts.rows] == [
        ("a", 4, 2, 1),
        ("b", 4, 2, 2),
    ]


@pytest.mark.parametrize("unlabeled", ["rest", "none"])
def test_coarse_labels(unlabeled):
    """They are counted among the unlabeled samples, in the table and in the file."""
    labels = torch.arange(40) % 4
    source = DatasetSource(TensorDataset(torch.rand(40, 1, 2, 2), labels), class_names=[*"abcd"])
    coarse = CoarseLabels({"ab": ["a", "b"], "cd": ["c", "d"]}, fraction=0.5)
    data = SemiSupervisedDataModule(source, labeled=2, val_size=0, unlabeled=unlabeled, coarse=coarse, batch_size=40)
    data.prepare_data()
    data.setup("fit")
    count = int((data._labels.kind == LabelKind.COARSE).sum())
    assert 0 < count < 32
    counts = count_parts(data.samples, data.split, data._labels, data.train_dataloader().dataset.indices)
    assert (counts.labeled, counts.unlabeled, counts.coarse) == (8, 32 if unlabeled == "rest" else count, count)
    assert ["with", "a", "coarse", "label", str(count)] in [line.split() for line in str(counts).splitlines()]
    assert counts.to_dict()["samples"]["coarse"] == count


def test_probabilities_count_as_the_most_likely_class():
    y = torch.tensor([[0.4, 0.35, 0.25], [0.2, 0.3, 0.5], [0.1, 0.4, 0.5], [torch.nan] * 3])
    counts = count_samples(y, torch.arange(4), y[:1], y[1:3])
    found = [[row.name, row.labeled, row.validation, row.test] for row in counts.rows]
    assert found == [["0", 1, 1, 0], ["1", 0, 0, 0], ["2", 2, 0, 2]]
    assert counts.unlabeled == 1
