"""TorchvisionDataset: names of splits, and those that a dataset does not have."""

import pytest
import torch
from PIL import Image

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


GENERA = ("00000_a_b_c_d_e_f_g", "00001_a_b_c_d_e_f_h", "00002_a_b_c_d_e_z_i")


class TestINaturalist:
    @pytest.fixture
    def load(self, tmp_path):
        folders = {"2021_train": GENERA, "2021_train_mini": GENERA, "2021_valid": GENERA[:2]}
        folders |= {"2018": ("A/0", "B/1"), "2019": ("B/0", "B/1", "B/2")}
        for version, names in folders.items():
            for name in names:
                (tmp_path / version / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(tmp_path / version / name / f"{version}.jpg")

        def load(**arguments):
            parts = TorchvisionDataset("INaturalist", str(tmp_path), **arguments).load()
            found = {
                name: getattr(parts, name) for name in ("train", "val", "test") if getattr(parts, name) is not None
            }
            return {name: part.targets.tolist() for name, part in found.items()}, parts

        return load

    @pytest.mark.parametrize(
        ("arguments", "train"),
        [
            ({}, "2021_train"),
            ({"options": {"version": "2021_train_mini"}}, "2021_train_mini"),
            ({"train_split": "2021_train_mini"}, "2021_train_mini"),
        ],
    )
    def test_versions_are_parts(self, load, arguments, train):
        found, parts = load(**arguments)
        assert found == {"train": [0, 1, 2]}
        assert parts.class_names == [*GENERA]
        found, parts = load(val_split="2021_valid", unlabeled_split="2018", **arguments)
        assert found == {"train": [0, 1, 2], "val": [0, 1]}
        assert {path.split("/")[-1] for path in parts.train.images.paths} == {f"{train}.jpg"}
        assert len(parts.unlabeled) == 2
        assert load(test_split="2021_valid", **arguments)[0]["test"] == [0, 1]

    def test_classes_meet_by_name(self, load):
        found, parts = load(train_split="2018", test_split="2019", options={"target_type": "super"})
        assert found == {"train": [0, 1], "test": [1, 1, 1]}
        assert parts.class_names == ["A", "B"]
        assert load(options={"target_type": "genus"})[1].class_names == ["f", "z"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"val_split": "2021_train"}, "val_split and train_split must differ, got 2021_train for both"),
            ({"val_split": "valid"}, "Unknown value 'valid' for argument version. .*2021_valid"),
            ({"train_split": "2018", "options": {"version": "2019"}}, "multiple values for keyword argument 'version'"),
        ],
    )
    def test_what_cannot_be(self, load, arguments, message):
        with pytest.raises(InputError, match=message):
            load(**arguments)


def test_stl10_has_its_unlabeled_images_once():
    assert TorchvisionDataset("STL10", ".").splits["unlabeled"] == "unlabeled"
    assert "unlabeled" not in TorchvisionDataset("STL10", ".", train_split="train+unlabeled").splits


def test_cats_and_dogs_of_the_pets(tmp_path):
    """The 37 breeds are the names of the other labels."""
    annotations = tmp_path / "oxford-iiit-pet/annotations"
    annotations.mkdir(parents=True)
    for split in ("trainval", "test"):
        (annotations / f"{split}.txt").write_text("Abyssinian_1 1 1 1\nbeagle_1 5 2 1\nPersian_1 24 1 9\n")
    images = tmp_path / "oxford-iiit-pet/images"
    images.mkdir()
    for name in ("Abyssinian", "beagle", "Persian"):
        Image.new("RGB", (8, 8)).save(images / f"{name}_1.jpg")
    made = {"train_split": "trainval", "options": {"target_types": "binary-category"}}
    parts = TorchvisionDataset("OxfordIIITPet", str(tmp_path), **made).load()
    assert parts.class_names == ["Cat", "Dog"]
    assert parts.train.targets.tolist() == [0, 1, 0]
