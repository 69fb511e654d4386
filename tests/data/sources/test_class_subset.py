"""ClassSubset: some classes of a source, renumbered."""

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.utils import save_image

from kd_lightning import ClassSubset, DatasetSource, Digits, ImageFolder, InputError, SemiSupervisedDataModule
from kd_lightning.data.sources.source import Part, Parts, Source


def test_images_and_labels():
    whole, parts = Digits().load(), ClassSubset(Digits(), [7, 0, 3]).load()
    assert parts.class_names == ["7", "0", "3"]
    for part, old in ((parts.train, whole.train), (parts.test, whole.test)):
        for number, name in enumerate((7, 0, 3)):
            rows = (old.targets == name).nonzero().flatten()
            selected = (part.targets == number).nonzero().flatten()
            images = torch.stack([part.images[int(row)][0] for row in selected])
            assert torch.equal(images, torch.stack([old.images[int(row)][0] for row in rows]))
        assert len(part.images) == len(part.targets)
    assert {*parts.train.targets.tolist()} == {0, 1, 2}
    source = Digits()
    assert ClassSubset(source, [1]).train_transform is source.train_transform


def test_unlabeled_part_stays_whole():
    source = DatasetSource(
        TensorDataset(torch.rand(6, 2), torch.arange(6) % 3), unlabeled=TensorDataset(torch.rand(5, 2))
    )
    parts = ClassSubset(source, [2, 1]).load()
    assert len(parts.unlabeled) == 5
    assert (parts.test, parts.class_names) == (None, None)
    assert parts.train.targets.tolist() == [1, 0, 1, 0]


def test_in_a_datamodule():
    data = SemiSupervisedDataModule(ClassSubset(Digits(), [5, 6, 7, 8, 9]), labeled=2)
    data.setup("")
    labels = data.visible_labels()
    assert torch.bincount(labels[labels >= 0]).tolist() == [2] * 5
    assert {int(y) for batch in data.test_dataloader() for y in batch.y} == {*range(5)}


def test_paths_are_known(tmp_path):
    for name in ("a/1.png", "b/2.png", "b/3.png", "c/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_image(torch.rand(3, 8, 8), tmp_path / name)
    data = SemiSupervisedDataModule(ClassSubset(ImageFolder(str(tmp_path)), [2, 1]), val_size=0)
    assert [data.path(index) for index in range(3)] == [
        str(tmp_path / name) for name in ("b/2.png", "b/3.png", "c/4.png")
    ]
    (tmp_path / "labels.csv").write_text("path,label\nb/3.png,c\n")
    data = SemiSupervisedDataModule(
        ClassSubset(ImageFolder(str(tmp_path)), [2, 1]), val_size=0, label_file=tmp_path / "labels.csv"
    )
    assert data.visible_labels().tolist() == [1, 0, 0]


@pytest.mark.parametrize("classes", [[], [1, 1]])
def test_invalid_classes(classes):
    with pytest.raises(InputError, match="classes must name at least one class, and none twice, got"):
        ClassSubset(Digits(), classes)


@pytest.mark.parametrize("unknown", [10, -1])
def test_class_that_the_source_lacks(unknown):
    with pytest.raises(InputError, match=rf"classes must be 0 ... 9, got {unknown}"):
        ClassSubset(Digits(), [3, unknown]).load()


@pytest.mark.parametrize("y", [torch.ones(4, 3), torch.rand(4)])
def test_samples_of_many_labels(y):
    with pytest.raises(
        InputError, match="classes: images must have one class each; those of DatasetSource have many labels"
    ):
        ClassSubset(DatasetSource(TensorDataset(torch.rand(4, 2), y)), [0]).load()


def test_empty_source():
    empty = DatasetSource(TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(InputError, match="classes: the training part of DatasetSource is empty"):
        ClassSubset(empty, [0]).load()


def test_images_without_a_label_stay():
    """Their class is unknown, as that of the unlabeled part."""
    labels = torch.tensor([0, -1, 2, 156, -100, 2], dtype=torch.int16)
    part = TensorDataset(torch.arange(6.0).reshape(6, 1), labels)
    parts = ClassSubset(DatasetSource(part, part), [2, 156]).load()
    for found in (parts.train, parts.test):
        assert found.targets.tolist() == [-100, 0, 1, -100, 0]
        assert [float(found.images[place][0]) for place in range(5)] == [1, 2, 3, 4, 5]
    data = SemiSupervisedDataModule(ClassSubset(DatasetSource(part), [2, 0]), val_size=0)
    assert data.visible_labels().tolist() == [1, -100, 0, -100, 0]
    assert data.unlabeled_indices() == [1, 3]


def test_uint8_labels_of_a_source_of_ones_own():
    """As an index, uint8 would be a mask."""

    class Own(Source):
        def load(self):
            return Parts(Part(TensorDataset(torch.arange(4.0)), torch.tensor([0, 156, 1, 1], dtype=torch.uint8)))

    parts = ClassSubset(Own(), [1, 156]).load()
    assert parts.train.targets.tolist() == [1, 0, 0]
    assert [float(parts.train.images[place][0]) for place in range(3)] == [1, 2, 3]


def test_classes_that_a_part_lacks():
    train = TensorDataset(torch.rand(4, 1), torch.tensor([0, 1, 2, 2]))
    test = TensorDataset(torch.rand(2, 1), torch.tensor([0, 1]))
    source = DatasetSource(train, test, class_names=["a", "b", "c", "d"])
    parts = ClassSubset(source, [2, 1]).load()
    assert (parts.train.targets.tolist(), parts.test.targets.tolist()) == ([1, 0, 0], [1])
    assert ClassSubset(source, [2, 3]).load().test is None  # no test image has one of the classes
    parts = ClassSubset(source, [3, 0]).load()  # no training image has class d
    assert (parts.train.targets.tolist(), parts.class_names) == ([1], ["d", "a"])
