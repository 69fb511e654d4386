"""TorchvisionDataset: names of splits, and those that a dataset does not have."""

import pytest
import torch

from kd_lightning import InputError, SemiSupervisedDataModule
from kd_lightning.data.sources.torchvision_dataset import TorchvisionDataset


def test_splits_by_name(monkeypatch):
    class Flowers(torch.utils.data.Dataset):
        def __init__(self, root, split="train", transform=None):
            if split not in ("train", "val", "test", "extra"):
                raise ValueError(f"unknown split {split}")
            self.size = {"train": 8, "val": 3, "test": 2, "extra": 5}[split]
            self.offset = {"train": 0, "val": 100, "test": 150, "extra": 200}[split]

        def __len__(self):
            return self.size

        def __getitem__(self, index):
            return torch.full((3, 4, 4), self.offset + index, dtype=torch.uint8), index % 2

    monkeypatch.setattr("torchvision.datasets.Flowers102", Flowers)
    made = TorchvisionDataset("Flowers102", ".", val_split="val", unlabeled_split="extra")
    data = SemiSupervisedDataModule(made, labeled=2, unlabeled="source", batch_size=5)
    data.setup("fit")
    assert data.split.val == [8, 9, 10]
    assert len(data.unlabeled_indices()) == 5
    with pytest.raises(InputError, match="unknown split valid"):
        TorchvisionDataset("Flowers102", ".", val_split="valid").load()


@pytest.mark.parametrize("name", ["CIFAR10", "EMNIST", "EuroSAT"])
@pytest.mark.parametrize("part", ["train", "test", "val", "unlabeled"])
def test_datasets_without_such_splits(name, part):
    with pytest.raises(InputError, match=f"{part}_split: {name} has no argument split for parts, got 'extra'"):
        TorchvisionDataset(name, ".", **{f"{part}_split": "extra"}).load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_split": "train"}, "val_split and train_split must differ, got train for both"),
        ({"val_split": "test"}, "val_split and test_split must differ, got test for both"),
        ({"train_split": "extra", "unlabeled_split": "extra"}, "unlabeled_split and train_split must differ"),
    ],
)
def test_two_parts_of_one_split(arguments, message):
    """Such a part would be trained on, and measure nothing."""
    with pytest.raises(InputError, match=message):
        TorchvisionDataset("SVHN", ".", **arguments)


def test_no_test_part():
    """ImageNet, Imagenette and Places365 have labels of two splits alone."""
    made = TorchvisionDataset("Places365", ".", test_split=None, train_split="train-standard", val_split="val")
    assert made._selectors() == {"train": {"split": "train-standard"}, "val": {"split": "val"}}
    assert TorchvisionDataset("CIFAR10", ".", test_split=None)._selectors() == {"train": {"train": True}}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("OxfordIIITPet", "trainval.*test"),
        ("SVHN", "train.*test.*extra"),
        ("STL10", "train.*unlabeled.*test"),
        ("Places365", "train-standard.*train-challenge.*val"),
        ("Flowers102", "train.*val.*test"),
    ],
)
def test_names_that_a_dataset_does_not_have(tmp_path, name, names):
    with pytest.raises(InputError, match=f"valid.*{names}") as error:
        TorchvisionDataset(name, str(tmp_path), train_split="valid").load()
    assert "\n" not in str(error.value)


def test_split_of_emnist_is_no_part(monkeypatch):
    seen = []
    monkeypatch.setattr("torchvision.datasets.EMNIST.__init__", lambda self, *args, **kwargs: seen.append(kwargs))
    made = TorchvisionDataset("EMNIST", ".", {"split": "letters"})
    assert [*made._selectors().values()] == [{"train": True}, {"train": False}]
