"""Sources: the real loading code on small files, and paths and hashes of images."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from kd_lightning import (
    DatasetSource,
    Digits,
    FakeData,
    ImageFolder,
    InputError,
    SemiSupervisedDataModule,
    TorchvisionDataset,
)
from kd_lightning.data.sources.images import identity, path_of, read_image


def test_digits():
    first, again = Digits().load(), Digits().load()
    assert (len(first.train.images), len(first.test.images)) == (1197, 600)
    pixels = torch.cat([first.train.images.tensors[0], first.test.images.tensors[0]])
    assert len({tuple(image.flatten().tolist()) for image in pixels}) == 1797  # all different: no test image trains
    assert torch.equal(first.train.targets, again.train.targets)
    assert pixels.min() == 0
    assert pixels.max() == 1


class Pictures(Dataset):
    """PIL items, labels only inside the items."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), (index, 0, 0)), index % 2


class WithTargets(Pictures):
    targets = [1, 0, 1, 0, 1, 0]

    def __getitem__(self, index):
        raise AssertionError("labels must be read without loading images")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (TensorDataset(torch.rand(3, 2), torch.tensor([2, 0, 1])), [2, 0, 1]),
        (Pictures(), [0, 1, 0, 1, 0, 1]),
    ],
)
def test_labels_of_a_users_dataset(dataset, expected):
    assert DatasetSource(dataset).load().train.targets.tolist() == expected


def test_labels_are_read_without_images():
    source = DatasetSource.__new__(DatasetSource)
    source.train, source.test, source.unlabeled, source.class_names = WithTargets(), None, None, None
    source.val = None
    assert source.load().train.targets.tolist() == WithTargets.targets


def test_pictures_become_tensors():
    batch = next(iter(SemiSupervisedDataModule(DatasetSource(Pictures()), val_size=0, batch_size=6).train_dataloader()))
    assert batch.x.shape == (6, 3, 8, 8)
    assert batch.x.amax().item() == pytest.approx(5 / 255)


def test_palettes_become_colours(tmp_path):
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8))
    palette = colors.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "0.png", transparency=bytes([0, 100]))
    for picture in (palette, Image.open(tmp_path / "0.png"), palette.convert("PA")):
        source = DatasetSource([(picture, 0)] * 2)
        batch = next(iter(SemiSupervisedDataModule(source, val_size=0).train_dataloader()))
        wanted = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1) / 255
        torch.testing.assert_close(batch.x[0], wanted)


def test_damaged_files_that_a_dataset_opens_only(tmp_path):
    path = tmp_path / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"item 0 of list cannot be read: OSError: image file is truncated"):
        read_image([[(Image.open(path), 0)]], 0)


@pytest.mark.parametrize("image", [Image.new("I", (4, 4), 9), np.ones((4, 4), np.int64), np.ones((4, 4), np.uint32)])
def test_images_of_32_bits_are_reported(image):
    with pytest.warns(UserWarning, match=r"images are u?int\d\d, .*default transforms divide them by"):
        DatasetSource([(image, 0)])


@pytest.fixture
def folder(tmp_path):
    for part in ("train/cat", "train/dog", "test/cat", "test/dog", "more/deep/er"):
        (tmp_path / part).mkdir(parents=True)
        for number in range(4):
            color = (200, 0, 0) if part.endswith("cat") else (0, 0, 200)
            Image.new("RGB", (20, 16), color).save(tmp_path / part / f"{number}.png")
    return tmp_path


def test_image_folder(folder):
    source = ImageFolder(str(folder / "train"), str(folder / "test"), str(folder / "more"), image_size=14)
    data = SemiSupervisedDataModule(source, labeled=2, unlabeled="source", val_size=1, batch_size=99)
    (batch,) = list(data.train_dataloader())
    assert data.class_names == ["cat", "dog"]
    assert batch.x.shape == (2 * 2 + 4, 3, 14, 14)
    assert sorted(batch.y.tolist()) == [-100] * 4 + [0, 0, 1, 1]
    red = batch.x[:, 0].mean(dim=(1, 2)) > 1
    assert torch.equal(red, batch.y == 0)  # each label with its own image


def test_invalid_image_folder(folder):
    with pytest.raises(InputError, match="train: .*gone must hold a subfolder of images"):
        ImageFolder(str(folder / "gone")).load()
    with pytest.raises(InputError, match="test: classes must be those of train"):
        ImageFolder(str(folder / "train"), str(folder / "more")).load()
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="unlabeled: no images in"):
        ImageFolder(str(folder / "train"), unlabeled=str(folder / "empty")).load()


def no_network(*args, **kwargs):
    raise AssertionError("nothing may be downloaded")


def test_mnist_from_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", no_network)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.repeat(labels * 20, 28 * 28).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
        header = struct.pack(">4i", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    source = TorchvisionDataset("MNIST", str(tmp_path))
    data = SemiSupervisedDataModule(source, labeled=1, val_size=1, batch_size=64, train_transform=source.eval_transform)
    data.prepare_data()
    (batch,) = list(data.train_dataloader())
    assert len(batch) == 30
    assert data.class_names[3] == "3 - three"
    known = batch.y != -100
    assert known.sum() == 10
    assert batch.x[known, 0, 14, 14] == pytest.approx((batch.y[known] * 20 / 255 - 0.1307) / 0.3081, abs=1e-5)
    assert len(next(iter(data.test_dataloader()))) == 20


def test_cifar_from_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name in names:
        content = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
        (base / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"c{k}" for k in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    parts = TorchvisionDataset("CIFAR10", str(tmp_path)).load()
    assert (len(parts.train.images), len(parts.test.images)) == (50, 10)
    assert parts.class_names[9] == "c9"


def test_stl10_brings_its_unlabeled_part(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    base = tmp_path / "stl10_binary"
    base.mkdir()
    for part, count in (("train", 20), ("test", 10), ("unlabeled", 7)):
        np.zeros((count, 3, 96, 96), np.uint8).tofile(base / f"{part}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(base / f"{part}_y.bin")
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    data = SemiSupervisedDataModule(
        TorchvisionDataset("STL10", str(tmp_path)), labeled=1, unlabeled="source", val_size=1, batch_size=99
    )
    (batch,) = list(data.train_dataloader())
    assert sorted(batch.y.tolist()) == [-100] * 7 + list(range(10))
    assert batch.x.shape[1:] == (3, 96, 96)


def test_invalid_torchvision_dataset(tmp_path):
    with pytest.raises(InputError, match="name must be a dataset of torchvision.datasets, got 'CIFAR11'"):
        TorchvisionDataset("CIFAR11", str(tmp_path))
    with pytest.raises(InputError, match="MNIST in .* cannot be opened"):
        TorchvisionDataset("MNIST", str(tmp_path)).load()


def test_fake_data():
    data = SemiSupervisedDataModule(
        FakeData(size=40, image_size=(3, 10, 12), num_classes=4), val_size=0.25, batch_size=99
    )
    (batch,) = list(data.train_dataloader())
    assert batch.x.shape[1:] == (3, 10, 12)
    assert 0 <= batch.x.min() <= batch.x.max() <= 1


def test_transforms_can_be_replaced():
    crop = v2.CenterCrop(4)
    data = SemiSupervisedDataModule(Digits(), train_transform=crop, eval_transform=crop, batch_size=9)
    assert next(iter(data.train_dataloader())).x.shape == (9, 1, 4, 4)
    assert next(iter(data.test_dataloader())).x.shape == (9, 1, 4, 4)


class Listed(Dataset):
    """Items with paths, in one of the attributes that datasets use."""

    def __init__(self, name, paths):
        setattr(self, name, paths)
        self.count = len(paths)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raise OSError("broken file")


def test_image_and_path_of_several_parts(folder):
    parts = ImageFolder(str(folder / "train"), unlabeled=str(folder / "more")).load()
    both = [parts.train.images, parts.unlabeled]
    assert path_of(both, 5) == str(folder / "train/dog/1.png")
    assert path_of(both, 8) == str(folder / "more/deep/er/0.png")
    assert read_image(both, 5).getpixel((0, 0)) == (0, 0, 200)
    with pytest.raises(IndexError):
        path_of(both, 12)
    assert path_of([Digits().load().train.images], 3) is None
    assert path_of([Subset(parts.train.images, [7, 5])], 1) == str(folder / "train/dog/1.png")


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("samples", [("a/0.png", 1), ("a/1.png", 0)]),
        ("samples", [["a/0.png", 1], ["a/1.png", 0]]),
        ("paths", ["a/0.png", "a/1.png"]),
        ("_image_files", [Path("a/0.png"), Path("a/1.png")]),
    ],
)
def test_path_of_a_file_that_cannot_be_read(name, items):
    dataset = Listed(name, items)
    assert path_of([dataset], 1) == str(Path("a/1.png"))
    with pytest.raises(InputError, match="image a.1.png cannot be read: OSError: broken file"):
        read_image([dataset], 1)


def test_samples_that_are_no_files():
    assert path_of([Listed("samples", [(torch.rand(3, 3), 0), (torch.rand(3, 3), 1)])], 1) is None
    with pytest.raises(InputError, match="item 0 of Listed cannot be read: OSError"):
        read_image([Listed("samples", [(torch.rand(3, 3), 0)])], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool])
def test_identity_of_images_in_memory(dtype):
    x = torch.rand(6, 3, 2).mul(255).to(dtype)
    x[0, 0, 0] = 1
    other = x.clone()
    other[0, 0, 0] = 0
    same = identity(TensorDataset(x))
    assert same == identity(TensorDataset(x.clone(), torch.arange(6)))  # labels are no part of it
    assert same == identity(TensorDataset(x.transpose(1, 2).contiguous().transpose(1, 2)))
    found = {same, identity(TensorDataset(other)), identity(TensorDataset(x[:5]))}
    found |= {identity(Subset(TensorDataset(x), rows)) for rows in ([0, 1], [1, 2], np.array([2, 3]))}
    found |= {identity(Subset(TensorDataset(other), [0, 1]))}
    assert len(found) == 7


def test_identity_of_an_array():
    class Array(Pictures):
        def __init__(self, data):
            self.data = data

    data = np.arange(24, dtype=np.uint8).reshape(6, 4)
    assert identity(Array(data)) == identity(Array(np.asfortranarray(data)))
    assert identity(Array(data)) != identity(Array(data[::-1]))
    assert identity(Array(list(data))) == identity(Array(None))  # only their number is known


def test_identity_of_files(folder):
    def load(root):
        parts = ImageFolder(str(root / "train"), unlabeled=str(root / "more")).load()
        return identity(parts.train.images), identity(parts.unlabeled)

    before = load(folder)
    assert load(folder) == before
    assert len({*before}) == 2
    moved = folder / "elsewhere" / "deep"
    moved.mkdir(parents=True)
    for name in ("train", "more"):
        (folder / name).rename(moved / name)
    assert load(moved) == before  # the same files in another place
    (moved / "more/deep/er/0.png").rename(moved / "more/deep/er/9.png")
    assert load(moved)[0] == before[0]
    assert load(moved)[1] != before[1]
    (moved / "train/cat/3.png").unlink()
    assert load(moved)[0] != before[0]
