"""A source of torchvision's datasets, by name."""

from __future__ import annotations

import inspect
from typing import Any

import torchvision

from kd_lightning.data.sources._parts import class_names_of, dataset_part
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms import photo_transforms, small_image_transforms
from kd_lightning.errors import InputError


class TorchvisionDataset(Source):
    """Any classification dataset of torchvision, by name.

    Args:
        name: Class in ``torchvision.datasets``, such as ``MNIST``, ``FashionMNIST``, ``CIFAR10``, ``CIFAR100``,
            ``SVHN`` or ``STL10`` (which has an unlabeled part).
        root: Folder of the files. Missing files are downloaded there.
        options: Other arguments of the dataset, such as ``split: letters`` of EMNIST.
        test_split: Name of the test part, for datasets with the argument ``split``.
        image_size: Side in pixels of the square that the default transforms crop. The six datasets above have
            transforms of their own, without it.

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
        """Download missing files."""
        for selector in self._selectors():
            self._open(selector, download=True)

    def load(self) -> Parts:
        """Open the parts."""
        opened = [self._open(selector, download=False) for selector in self._selectors()]
        train = opened[0]
        return Parts(
            dataset_part(train),
            dataset_part(opened[1]) if len(opened) > 1 else None,
            opened[2] if len(opened) > 2 else None,
            class_names_of(train),
        )

    def _selectors(self) -> list[dict[str, Any]]:
        """Arguments that select the training, test and unlabeled part of the dataset."""
        parameters = inspect.signature(self.dataset).parameters  # type: ignore[arg-type]
        if "train" in parameters:
            return [{"train": True}, {"train": False}]
        if "split" in parameters:
            names = ["train", self.test_split, *(["unlabeled"] if self.name == "STL10" else [])]
            return [{"split": name} for name in names]
        return [{}]

    def _open(self, selector: dict[str, Any], *, download: bool) -> Any:
        assert self.dataset is not None
        downloads = "download" in inspect.signature(self.dataset).parameters
        try:
            return self.dataset(self.root, **self.options, **selector, **({"download": download} if downloads else {}))
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            raise InputError(f"{self.name} in {self.root} cannot be opened with {selector}: {error}") from error


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
