"""Images in memory are read as one tensor, and equal those that the dataset returns."""

import gzip

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from kd_lightning.data.sources.memory import rows_of
from kd_lightning.data.sources.pixels import read_pixels


def check(images, count):
    rows = rows_of([images])
    assert len(rows) == len(images) == count
    index = torch.randperm(count)
    read = rows.read(index)
    assert torch.equal(read, torch.stack([read_pixels([images], number) for number in index.tolist()]))
    assert read.is_contiguous()


def cifar(**options):
    made = object.__new__(torchvision.datasets.CIFAR10)
    made.data = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), np.uint8)
    made.targets, made.root = [0] * 12, ""
    made.transforms = made.transform = made.target_transform = None
    vars(made).update(options)
    return made


def svhn():
    made = object.__new__(torchvision.datasets.SVHN)
    made.data = np.random.default_rng(0).integers(0, 256, (12, 3, 6, 5), np.uint8)
    made.labels, made.transforms, made.transform, made.target_transform = [0] * 12, None, None, None
    return made


@pytest.mark.parametrize("values", [torch.rand(9, 1, 4, 5), torch.randint(256, (9, 3, 4, 5), dtype=torch.uint8)])
def test_tensors(values):
    check(TensorDataset(values, torch.zeros(9)), 9)
    check(Subset(TensorDataset(values), [3, 1, 1, 8]), 4)
    check(Subset(Subset(TensorDataset(values), [3, 1, 1, 8]), torch.tensor([2, 0])), 2)


def test_not_a_number():
    values = torch.full((4, 1, 2, 2), float("nan"))
    assert rows_of([TensorDataset(values)]) is not None


def test_datasets_of_torchvision():
    check(cifar(), 12)
    check(svhn(), 12)
    check(Subset(cifar(), [5, 4]), 2)


def test_mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + b"".join(int(n).to_bytes(4, "big") for n in pixels.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 7]) + bytes(range(7)))
        for name in ("images-idx3", "labels-idx1"):
            file = folder / f"{part}-{name}-ubyte"
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    check(torchvision.datasets.MNIST(tmp_path, train=True), 7)


class Brighter(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0] + 1


class Mirrored(torchvision.datasets.CIFAR10):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.transpose(0), label


class PartlyPainted(torchvision.datasets.CIFAR10):
    """Few images differ from those in memory, as in a data set of which a part is poisoned."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image.transpose(0) if index == 2 else image), label


def partly_painted():
    made = cifar()
    made.__class__ = PartlyPainted
    return made


def mirrored():
    made = cifar()
    made.__class__ = Mirrored
    return made


class Own(Dataset):
    data = np.zeros((3, 4, 4, 3), np.uint8)

    def __getitem__(self, index):
        return self.data[index]

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    "images",
    [
        Brighter(torch.rand(4, 1, 2, 2)),
        mirrored(),
        partly_painted(),
        cifar(transforms=torchvision.datasets.vision.StandardTransform(np.asarray, None)),
        Own(),
        ConcatDataset([TensorDataset(torch.rand(4, 1, 2, 2)), TensorDataset(torch.rand(4, 1, 2, 3))]),
        [torch.zeros(1)],
    ],
)
def test_datasets_that_change_their_images(images):
    assert rows_of([images]) is None
    assert rows_of([TensorDataset(torch.rand(4, 1, 2, 2)), images]) is None


def test_parts_of_a_source():
    """Indices count through all parts."""
    values = torch.rand(14, 1, 4, 5)
    parts = [TensorDataset(values[:3]), Subset(TensorDataset(values), [*range(3, 9)]), TensorDataset(values[9:])]
    rows = rows_of(parts)
    index = torch.randperm(14).repeat(2)
    assert len(rows) == 14
    assert torch.equal(rows.read(index), values[index])
    assert torch.equal(rows.read(index[:0]), values[:0])
    for other in (torch.rand(4, 1, 4, 6), torch.rand(4, 1, 4, 5).double()):
        assert rows_of([*parts, TensorDataset(other)]) is None
