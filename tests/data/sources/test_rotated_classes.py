"""RotatedClasses: rotated images and their classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.utils import save_image

from kd_lightning import ClassSubset, DatasetSource, Digits, ImageFolder, InputError, RotatedClasses
from kd_lightning.data.sources.images import path_of


def test_images_labels_and_names():
    source = ClassSubset(Digits(), [3, 8, 1])
    plain, parts = source.load(), RotatedClasses(source).load()
    assert parts.class_names == [f"{name} at {turn}" for turn in (0, 90, 180, 270) for name in "381"]
    for part, old in ((parts.train, plain.train), (parts.test, plain.test)):
        size = len(old.images)
        assert len(part.images) == len(part.targets) == 4 * size
        for row in (0, 5, size, 2 * size + 7, 4 * size - 1):
            turns, place = divmod(row, size)
            assert int(part.targets[row]) == 3 * turns + int(old.targets[place])
            expected = np.rot90(old.images[place][0].numpy(), turns, (1, 2))
            assert (part.images[row].numpy() == expected).all()


def test_sides_of_other_lengths():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    images = RotatedClasses(DatasetSource(TensorDataset(x, torch.zeros(1, dtype=torch.long)))).load().train.images
    assert [tuple(images[turns].shape) for turns in range(4)] == [(1, 3, 4), (1, 4, 3)] * 2


def test_files(tmp_path):
    """PIL images rotate as tensors do; nothing else of a source changes."""
    pixels = torch.rand(3, 8, 8).round()
    (tmp_path / "a").mkdir()
    save_image(pixels, tmp_path / "a" / "x.png")
    source = ImageFolder(str(tmp_path))
    rotated = RotatedClasses(source)
    assert (rotated.train_transform, rotated.eval_transform) == (source.train_transform, source.eval_transform)
    parts = rotated.load()
    assert parts.test is parts.unlabeled is None
    for turns in range(4):
        image = parts.train.images[turns]
        assert isinstance(image, Image.Image)
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        assert torch.equal(found, torch.rot90(pixels, turns, (1, 2)))
        assert path_of([parts.train.images], turns) == str(tmp_path / "a" / "x.png")


def test_bad_input():
    many = DatasetSource(TensorDataset(torch.rand(4, 1, 2, 2), torch.eye(4)))
    with pytest.raises(
        InputError, match="RotatedClasses: images must have one class each; those of DatasetSource have many labels"
    ):
        RotatedClasses(many).load()
    flat = RotatedClasses(DatasetSource(TensorDataset(torch.rand(4, 5), torch.arange(4)))).load()
    assert len(flat.train.images) == 16
    with pytest.raises(InputError, match=r"images must be PIL images or tensors \(C, H, W\), got Tensor"):
        _ = flat.train.images[0]


def test_images_without_a_label_have_none_in_any_rotation():
    labels = torch.tensor([0, -1, 2], dtype=torch.int8)
    parts = RotatedClasses(DatasetSource(TensorDataset(torch.rand(3, 1, 2, 2), labels))).load()
    assert parts.train.targets.tolist() == [0, -100, 2, 3, -100, 5, 6, -100, 8, 9, -100, 11]
    assert len(parts.class_names) == 12


def test_classes_without_names():
    source = DatasetSource(TensorDataset(torch.rand(2, 1, 2, 2), torch.tensor([0, 3])), class_names=["a", "b"])
    with pytest.raises(InputError, match="class_names must name all classes, but there are 2 names.* class 3"):
        RotatedClasses(source).load()  # class 3 would be class 1 after a quarter turn


def test_no_image_has_a_label():
    parts = RotatedClasses(DatasetSource(TensorDataset(torch.rand(2, 1, 2, 2), torch.tensor([-1, -1])))).load()
    assert (parts.train.targets.tolist(), parts.class_names) == ([-100] * 8, [])
