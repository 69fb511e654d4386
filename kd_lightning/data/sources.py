"""Where images and their labels come from."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from kd_lightning.data.images import Images, read_item
from kd_lightning.errors import InputError


class Part(NamedTuple):
    """Images and their true labels: (N,) class indices, or (N, L) zeros and ones."""

    images: Images
    targets: Tensor


class Parts(NamedTuple):
    """What a source holds."""

    train: Part
    test: Part | None = None
    unlabeled: Images | None = None
    class_names: list[str] | None = None


class Source(ABC):
    """Images, labels, and the transforms that suit them.

    Attributes:
        train_transform: Default augmentation, from an item's image to a tensor; None: as it is.
        eval_transform: The same without randomness.
    """

    train_transform: nn.Module | None = None
    eval_transform: nn.Module | None = None

    def prepare(self) -> None:  # noqa: B027  (most sources have nothing to download)
        """Download what is not there; called once, on one process."""

    @abstractmethod
    def load(self) -> Parts:
        """Open the images and read the labels; called on every process."""


class Digits(Source):
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; 600 of them, drawn once and for all, are the test part.

    Images are tensors (1, 8, 8) in [0, 1].
    """

    def __init__(self) -> None:
        # turns and scales alone: moves are rounded to pixels, and half a one is none
        self.train_transform = v2.RandomAffine(
            degrees=10, translate=(0.0625, 0.0625), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        )

    def load(self) -> Parts:
        """Split into 1197 training and 600 test images."""
        from sklearn.datasets import load_digits  # here, since it takes half a second

        digits = load_digits()
        images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
        targets = torch.from_numpy(digits.target).long()
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(targets)))
        train, test = order[600:], order[:600]
        return Parts(
            Part(TensorDataset(images[train]), targets[train]),
            Part(TensorDataset(images[test]), targets[test]),
            class_names=[str(name) for name in digits.target_names],
        )


class DatasetSource(Source):
    """Your own map-style datasets, whose items are ``(image, label)`` or, for unlabeled, ``image``.

    Args:
        train: The training part; labels are read from its ``targets``, ``labels`` or ``tensors``, else one by one.
        test: The test part.
        unlabeled: More images without labels.
        class_names: In the order of the class indices.
    """

    def __init__(
        self,
        train: Dataset[Any],
        test: Dataset[Any] | None = None,
        unlabeled: Dataset[Any] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.train = train
        self.test = test
        self.unlabeled = unlabeled
        self.class_names = class_names
        first = train[0] if len(train) else None  # type: ignore[arg-type]
        first = first[0] if isinstance(first, tuple | list) else first
        if not isinstance(first, Tensor):
            self.train_transform = self.eval_transform = to_float()

    def load(self) -> Parts:
        """Read the labels."""
        return Parts(
            _part(self.train),
            None if self.test is None else _part(self.test),
            self.unlabeled,  # type: ignore[arg-type]
            self.class_names or _class_names(self.train),
        )


class FakeData(Source):
    """torchvision's FakeData: random images with random labels, for trying things out.

    Args:
        size: Number of training images; the test part has as many.
        image_size: Channels, height, width.
        num_classes: Number of classes.
    """

    def __init__(self, size: int = 256, image_size: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10) -> None:
        self.size = size
        self.image_size = tuple(image_size)
        self.num_classes = num_classes
        self.train_transform = v2.Compose([v2.RandomHorizontalFlip(), to_float()])
        self.eval_transform = to_float()

    def load(self) -> Parts:
        """Make the images."""
        train, test = (
            torchvision.datasets.FakeData(self.size, self.image_size, self.num_classes, random_offset=offset)
            for offset in (0, self.size)
        )
        return Parts(_part(train), _part(test), class_names=[str(number) for number in range(self.num_classes)])


class ImageFolder(Source):
    """Folders of images, one subfolder a class.

    Args:
        train: Folder of the training part.
        test: Folder of the test part; its subfolders must be those of ``train``.
        unlabeled: Folder of images without labels, at any depth.
        image_size: Side of the square that images are cropped to by the default transforms.
    """

    def __init__(
        self, train: str, test: str | None = None, unlabeled: str | None = None, image_size: int = 224
    ) -> None:
        self.train = train
        self.test = test
        self.unlabeled = unlabeled
        self.train_transform, self.eval_transform = photo_transforms(image_size)

    def load(self) -> Parts:
        """List the files.

        Raises:
            InputError: If a folder is missing or has no images, or the classes differ.
        """
        train = self._open("train", self.train)
        test = None if self.test is None else self._open("test", self.test)
        if test is not None and test.classes != train.classes:
            raise InputError(f"test: its classes must be those of train, {train.classes}, got {test.classes}")
        return Parts(
            _part(train),
            None if test is None else _part(test),
            None if self.unlabeled is None else _FlatFolder(self.unlabeled),
            train.classes,
        )

    @staticmethod
    def _open(name: str, folder: str) -> torchvision.datasets.ImageFolder:
        try:
            return torchvision.datasets.ImageFolder(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{name}: {folder} must hold a subfolder of images for each class: {error}") from error


class _FlatFolder:
    """Every image below a folder, in the order of the paths."""

    def __init__(self, root: str) -> None:
        endings = torchvision.datasets.folder.IMG_EXTENSIONS
        self.paths = sorted(str(p) for p in Path(root).rglob("*") if p.suffix.lower() in endings)
        if not self.paths:
            raise InputError(f"unlabeled: no images in {root}; allowed endings: {', '.join(endings)}")

    def __getitem__(self, index: int, /) -> Any:
        return torchvision.datasets.folder.default_loader(self.paths[index])

    def __len__(self) -> int:
        return len(self.paths)


class TorchvisionDataset(Source):
    """Any classification dataset of torchvision, by name.

    Args:
        name: Such as ``MNIST``, ``FashionMNIST``, ``CIFAR10``, ``CIFAR100``, ``SVHN``, ``STL10`` (which brings an
            unlabeled part of its own).
        root: Folder of the files; what is missing is downloaded there.
        options: More arguments of the dataset, such as ``split: letters`` of EMNIST.
        test_split: Name of the test part, where the dataset has named parts.
        image_size: Side that the default transforms crop to, for datasets without a usual recipe.

    Raises:
        InputError: For a name that torchvision does not have.
    """

    def __init__(
        self,
        name: str,
        root: str,
        options: dict[str, Any] | None = None,
        test_split: str = "test",
        image_size: int = 224,
    ) -> None:
        self.dataset = getattr(torchvision.datasets, name, None)
        if not isinstance(self.dataset, type):
            raise InputError(f"name must be a dataset of torchvision.datasets, got {name!r}")
        self.name = name
        self.root = root
        self.options = options or {}
        self.test_split = test_split
        self.train_transform, self.eval_transform = _RECIPES.get(name, lambda: photo_transforms(image_size))()

    def prepare(self) -> None:
        """Download, once."""
        for selector in self._selectors():
            self._open(selector, download=True)

    def load(self) -> Parts:
        """Open the parts."""
        opened = [self._open(selector, download=False) for selector in self._selectors()]
        train = opened[0]
        return Parts(
            _part(train),
            _part(opened[1]) if len(opened) > 1 else None,
            opened[2] if len(opened) > 2 else None,
            _class_names(train),
        )

    def _selectors(self) -> list[dict[str, Any]]:
        """What asks the dataset for its training, test and unlabeled part."""
        parameters = inspect.signature(self.dataset).parameters  # type: ignore[arg-type]
        if "train" in parameters:
            return [{"train": True}, {"train": False}]
        if "split" in parameters:
            names = ["train", self.test_split, *(["unlabeled"] if self.name == "STL10" else [])]
            return [{"split": name} for name in names]
        return [{}]

    def _open(self, selector: dict[str, Any], *, download: bool) -> Any:
        assert self.dataset is not None
        asks = "download" in inspect.signature(self.dataset).parameters
        try:
            return self.dataset(self.root, **self.options, **selector, **({"download": download} if asks else {}))
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            raise InputError(f"{self.name} in {self.root} cannot be opened with {selector}: {error}") from error


def to_float() -> nn.Module:
    """Image or uint8 tensor to a float tensor in [0, 1]."""
    transform: nn.Module = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return transform


def photo_transforms(size: int) -> tuple[nn.Module, nn.Module]:
    """Training and evaluation transforms for photographs, normalised as torchvision's pretrained networks expect."""
    tail = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
    tail.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (
        v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *tail]),
        v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), *tail]),
    )


def _small(
    mean: Sequence[float], std: Sequence[float], size: int, *, flip: bool, padding: int = 4
) -> tuple[nn.Module, nn.Module]:
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    crop = [v2.RandomCrop(size, padding=padding), *([v2.RandomHorizontalFlip()] if flip else [])]
    return v2.Compose([*crop, *tail]), v2.Compose(tail)


# Means and standard deviations of the training images, as everybody uses them; digits are not mirrored.
_RECIPES = {
    "MNIST": lambda: _small([0.1307], [0.3081], 28, flip=False, padding=2),
    "FashionMNIST": lambda: _small([0.2860], [0.3530], 28, flip=True, padding=2),
    "CIFAR10": lambda: _small([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], 32, flip=True),
    "CIFAR100": lambda: _small([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761], 32, flip=True),
    "SVHN": lambda: _small([0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970], 32, flip=False),
    "STL10": lambda: _small([0.4467, 0.4398, 0.4066], [0.2603, 0.2566, 0.2713], 96, flip=True, padding=12),
}


def _part(dataset: Any) -> Part:
    return Part(dataset, _targets(dataset))


def _targets(dataset: Any) -> Tensor:
    """The labels of a dataset, without loading its images where it keeps them beside."""
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            raise InputError("a labeled part must be a dataset of (image, label), got one without labels")
        found: Any = dataset.tensors[1]
    else:
        names = ("targets", "labels", "_labels")
        found = next((getattr(dataset, name) for name in names if hasattr(dataset, name)), None)
    if found is None or len(found) != len(dataset):
        found = [read_item(dataset, index)[1] for index in range(len(dataset))]
    if isinstance(found, list | tuple):
        found = torch.stack(list(found)) if found and isinstance(found[0], Tensor) else torch.tensor(found)
    targets = torch.as_tensor(found)
    return targets if targets.is_floating_point() else targets.long()


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None
