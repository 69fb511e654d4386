"""Raw pixels against those of the image that a dataset returns."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.data.sources import pixels
from kd_lightning.data.sources.image_files import ClassFolders, FlatFolder
from kd_lightning.data.sources.image_folder import ImageFolder
from kd_lightning.data.sources.image_loader import decode_image
from kd_lightning.data.sources.image_table import ListedImages
from kd_lightning.data.sources.images import path_of, read_image
from kd_lightning.data.sources.pixels import read_pixels
from kd_lightning.data.sources.rotated_classes import RotatedClasses
from kd_lightning.data.sources.torchvision_files import TorchvisionFiles

RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two pictures, of different sizes and formats, one of them turned."""
    turned = Image.Exif()
    turned[274] = 6
    for number, name in enumerate(["cats/0.jpg", "cats/1.jpg", "dogs/0.png", "dogs/1.gif"]):
        values = RANDOM.integers(0, 256, (10 + number, 15, 3)).astype(np.uint8)
        (path := tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path, **({"exif": turned} if number == 1 else {}))
    return str(tmp_path / "data")


@pytest.fixture
def files(monkeypatch):
    """A list to which each call of ``decode_image`` adds the path."""
    found = []

    def remember(path):
        found.append(path)
        return decode_image(path)

    monkeypatch.setattr(pixels, "decode_image", remember)
    return found


def expected(image):
    values = torch.from_numpy(np.array(image))
    return values.permute(2, 0, 1) if values.ndim == 3 else values[None]


def check(parts, files, *, direct):
    """Compare all pixels with the images, and check whether each file was decoded without the dataset."""
    size = sum(map(len, parts))
    for index in range(size):
        found = read_pixels(parts, index)
        assert found.dtype == torch.uint8
        assert type(found) is torch.Tensor
        assert found.equal(expected(read_image(parts, index)))
    assert files == ([path_of(parts, index) for index in range(size)] if direct else [])


class HalfGrey(ClassFolders):
    """A user's dataset that changes its pictures."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.convert("L"), label


class Mirrored(Subset):
    """A user's subset that changes its pictures."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), label

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


def torchvision_files(folder, transforms=None):
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(folder)
    dataset.transforms = transforms
    return TorchvisionFiles(dataset, [path for path, _ in dataset.samples], dataset.targets, pixels.load_image)


class TestFiles:
    def test_our_datasets(self, folder, files):
        check([ClassFolders("train", folder), FlatFolder("unlabeled", folder)], files, direct=True)

    def test_files_of_torchvision(self, folder, files):
        check([torchvision_files(folder)], files, direct=True)

    def test_subsets_and_chains(self, folder, files):
        images = ClassFolders("train", folder)
        chain = ConcatDataset([Subset(images, [3, 1]), FlatFolder("more", folder)])
        inner = Subset(Subset(chain, [5, 1, 0]), [2, 1])
        check([Subset(images, torch.tensor([2, 0])), chain, inner], files, direct=True)

    def test_indices_that_count_from_the_end(self, folder, files):
        images = ClassFolders("train", folder)
        chain = ConcatDataset([Subset(images, [0, 1]), Subset(images, [2])])
        subset = Subset(chain, [-1, -3])
        assert path_of([subset], 0) == images.samples[2][0]
        check([subset], files, direct=True)

    def test_source(self, folder, files):
        parts = ImageFolder(folder, unlabeled=folder).load()
        check([parts.train.images, parts.unlabeled], files, direct=True)


class TestWhatReturnsOtherImages:
    """It is never passed over."""

    def test_loader(self, folder, files):
        def load(path):
            return Image.open(path).convert("L")

        check([ClassFolders("train", folder, None, load), FlatFolder("more", folder, load)], files, direct=False)

    def test_loader_of_tensors(self, folder):
        images = ClassFolders("train", folder, None, lambda path: torch.full((2, 3, 4), 0.5))
        assert read_pixels([images], 1).equal(torch.full((2, 3, 4), 0.5))

    def test_subclasses(self, folder, files):
        check([HalfGrey("train", folder), Mirrored(ClassFolders("train", folder), [0, 2])], files, direct=False)

    def test_transforms_of_the_dataset(self, folder, files):
        check([torchvision_files(folder, lambda image, label: (image.rotate(180), label))], files, direct=False)

    def test_rotated_classes(self, folder, files):
        check([RotatedClasses(ImageFolder(folder)).load().train.images], files, direct=False)


class TestOtherDatasets:
    def test_pictures(self, files):
        rgb = Image.fromarray(RANDOM.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        check([Items((rgb, 0), (rgb.convert("L"), 1), {"image": rgb.quantize(8), "label": 0})], files, direct=False)

    def test_arrays_have_channels_last(self):
        values = RANDOM.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        assert read_pixels([Items((values, 0))], 0).equal(torch.from_numpy(values).permute(2, 0, 1))

    def test_tensors_stay_as_they_are(self):
        values = torch.rand(2, 3, 4, 5)
        assert read_pixels([TensorDataset(values, torch.zeros(2))], 1).equal(values[1])
        assert type(read_pixels([Items((v2.functional.to_image(values[0]), 0))], 0)) is torch.Tensor


class TestErrors:
    def test_a_damaged_file_is_named(self, folder):
        images = ClassFolders("train", folder)
        path = images.samples[0][0]
        os.truncate(path, 400)
        with pytest.raises(InputError) as error:
            read_pixels([images], 0)
        assert path in str(error.value)
        with pytest.raises(InputError) as same:
            read_image([images], 0)
        assert str(error.value) == str(same.value)

    def test_an_item_without_an_image_is_named(self):
        with pytest.raises(InputError, match="item 1 of Items cannot be read: TypeError: .*str"):
            read_pixels([Items((torch.zeros(1, 2, 2), 0)), Items(("no", 0), ("image", 0))], 2)

    def test_an_item_that_does_not_exist_is_named(self, folder):
        subset = Subset(ClassFolders("train", folder), [0, 99])
        for read in (read_image, read_pixels):
            with pytest.raises(InputError, match="item 1 of Subset cannot be read: IndexError"):
                read([subset], 1)
        for index in (2, -3):
            with pytest.raises(IndexError):
                read_pixels([subset], index)


def test_the_images_of_a_table_are_decoded_as_those_of_a_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8), "red").save(path)
    monkeypatch.setattr(pixels, "decode_image", lambda path: "by torchvision")
    assert read_pixels([ListedImages([str(path)], str(tmp_path))], 0) == "by torchvision"
    assert isinstance(
        read_pixels([ListedImages([str(path)], str(tmp_path), Image.open)], 0), torch.Tensor
    )  # a user's loader
