"""A source of torchvision's datasets, by name."""

from __future__ import annotations

import inspect
from itertools import combinations
from typing import Any

import torchvision

from kd_lightning.data.sources._parts import dataset_parts
from kd_lightning.data.sources.image_loader import Loader, load_image
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.sources.torchvision_files import open_files
from kd_lightning.data.transforms.recipes import photo_side, photo_transforms, small_image_transforms
from kd_lightning.errors import InputError


class TorchvisionDataset(Source):
    """Any classification dataset of torchvision, by name.

    Args:
        name: Class in ``torchvision.datasets``, such as ``MNIST``, ``FashionMNIST``, ``CIFAR10``, ``CIFAR100``,
            ``SVHN`` or ``STL10`` (which has an unlabeled part).
        root: Folder of the files. Missing files are downloaded there.
        options: Other arguments of the dataset, such as ``split: letters`` of EMNIST.
        test_split: Name of the test part, for datasets with the argument ``split``: ``val`` of ImageNet. None for none.
            The parts of INaturalist are its versions, such as ``2021_valid``; by default, it has no test part.
        image_size: Height and width in pixels that the default transforms crop, or one number for a square; at least 1.
            The six datasets above have transforms of their own, without it.
        train_split: Name of the training part, for datasets with the argument ``split``: ``trainval`` of OxfordIIITPet,
            ``train-standard`` of Places365. Of INaturalist it is by default ``version`` of ``options``, or 2021_train.
        loader: Function from the path of a file to a picture: a PIL image or a tensor (C, H, W), for datasets of image
            files. In YAML: the import path of a function, or a ``class_path`` of a class whose objects can be called.
            Default: :func:`~kd_lightning.data.sources.image_loader.load_image`. The images of datasets that lie in
            memory or in an archive, such as the six above, stay as they are.
        val_split: Name of your own validation part, such as ``val`` of Flowers102, for datasets with the argument
            ``split``. Default: None, which means that the datamodule takes ``val_size`` of the training part.
        unlabeled_split: Name of the unlabeled part, such as ``extra`` of SVHN. Its labels are not read. Default: None,
            which means ``unlabeled`` for STL10 (unless it is in ``train_split``), and none for the others.

    Raises:
        InputError: For a name that torchvision does not have, if ``image_size`` is out of range, for two parts of one
            split, and for the name of a split of a dataset without the argument ``split``.
    """

    def __init__(
        self,
        name: str,
        root: str,
        options: dict[str, Any] | None = None,
        test_split: str | None = "test",
        image_size: int | tuple[int, int] = 224,
        train_split: str = "train",
        loader: Loader = load_image,
        val_split: str | None = None,
        unlabeled_split: str | None = None,
    ) -> None:
        self.dataset = getattr(torchvision.datasets, name, None)
        if not isinstance(self.dataset, type):
            raise InputError(f"name must be a dataset of torchvision.datasets, got {name!r}")
        self.name = name
        self.root = root
        self.options = options or {}
        if unlabeled_split is None and name == "STL10" and "unlabeled" not in train_split:
            unlabeled_split = "unlabeled"
        names = {"train": train_split, "test": test_split, "val": val_split, "unlabeled": unlabeled_split}
        if name == "INaturalist":
            if train_split == _DEFAULTS["train"]:
                names["train"] = self.options.get("version", "2021_train")
                self.options = {key: value for key, value in self.options.items() if key != "version"}
            names["test"] = None if test_split == _DEFAULTS["test"] else test_split
        self.splits = {part: split for part, split in names.items() if split is not None}
        for (one, split), (other, same) in combinations(self.splits.items(), 2):
            if split == same:
                raise InputError(f"{other}_split and {one}_split must differ, got {split} for both; null means no part")
        self.loader = loader
        photos = photo_transforms(image_size)
        self.train_transform, self.eval_transform = _RECIPES[name]() if name in _RECIPES else photos
        self.stored_side = photo_side(image_size)

    def prepare(self) -> None:
        """Download missing files."""
        for selector in self._selectors().values():
            self._open(selector, download=True)

    def load(self) -> Parts:
        """Open the parts.

        Raises:
            InputError: If they cannot be opened, if the test part has a class that the training part lacks, or if
                ``loader`` is set and the dataset reads no image files.
        """
        opened = {
            part: self._with_loader(self._open(selector, download=False))
            for part, selector in self._selectors().items()
        }
        return dataset_parts(opened["train"], opened.get("test"), opened.get("unlabeled"), val=opened.get("val"))

    def _selectors(self) -> dict[str, dict[str, Any]]:
        """Arguments that select each part of the dataset."""
        if self.name == "INaturalist":
            return {part: {"version": name} for part, name in self.splits.items()}
        names = {name for kind in self.dataset.__mro__ for name in inspect.signature(kind).parameters}  # type: ignore[union-attr]
        if "split" in names and "train" not in names:  # split of EMNIST is no part
            return {part: {"split": name} for part, name in self.splits.items()}
        if wrong := [part for part, split in self.splits.items() if split != _DEFAULTS.get(part)]:
            part = wrong[0]
            raise InputError(f"{part}_split: {self.name} has no argument split for parts, got {self.splits[part]!r}")
        selectors: dict[str, dict[str, Any]] = {"train": {"train": True} if "train" in names else {}}
        return selectors | ({"test": {"train": False}} if "train" in names and "test" in self.splits else {})

    def _parameters(self) -> Any:
        return inspect.signature(self.dataset).parameters  # type: ignore[arg-type]

    def _open(self, selector: dict[str, Any], *, download: bool) -> Any:
        assert self.dataset is not None
        downloads = {"download": download} if "download" in self._parameters() else {}
        try:
            return self.dataset(self.root, **self.options, **selector, **downloads)
        except (RuntimeError, OSError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"{self.name} in {self.root} cannot be opened with {selector}: {error}") from error

    def _with_loader(self, dataset: Any) -> Any:
        """The dataset, with its image files, if any, read by the loader."""
        if "loader" in self.options:  # in Python: a function of the dataset's own kind of file
            return dataset
        files = open_files(dataset, self.loader)
        if files is None and self.loader is not load_image:
            raise InputError(f"loader: the images of {self.name} are not read by a loader; remove loader")
        return dataset if files is None else files


_DEFAULTS = {"train": "train", "test": "test"}

# The usual means and standard deviations of the training images. Digits are not mirrored.
_RECIPES = {
    "MNIST": lambda: small_image_transforms([0.1307], [0.3081], 28, flip=False, padding=2),
    "FashionMNIST": lambda: small_image_transforms([0.2860], [0.3530], 28, flip=True, padding=2),
    "CIFAR10": lambda: small_image_transforms([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], 32, flip=True),
    "CIFAR100": lambda: small_image_transforms([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761], 32, flip=True),
    "SVHN": lambda: small_image_transforms([0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970], 32, flip=False),
    "STL10": lambda: small_image_transforms(
        [0.4467, 0.4398, 0.4066], [0.2603, 0.2566, 0.2713], 96, flip=True, padding=12
    ),
}
