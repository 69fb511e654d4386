"""A source of folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision

from kd_lightning.data.sources._parts import dataset_part
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms import photo_transforms
from kd_lightning.errors import InputError


class ImageFolder(Source):
    """Folders of images with one subfolder per class.

    Args:
        train: Folder of the training part.
        test: Folder of the test part, with the same subfolders as ``train``. Default: None, which means none.
        unlabeled: Folder of images without labels, at any depth. Default: None, which means none.
        image_size: Side in pixels of the square that the default transforms crop.
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
            raise InputError(f"test: classes must be those of train, {train.classes}, got {test.classes}")
        return Parts(
            dataset_part(train),
            None if test is None else dataset_part(test),
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
    """All images below a folder, sorted by path."""

    def __init__(self, root: str) -> None:
        endings = torchvision.datasets.folder.IMG_EXTENSIONS
        self.paths = sorted(str(p) for p in Path(root).rglob("*") if p.suffix.lower() in endings)
        if not self.paths:
            raise InputError(f"unlabeled: no images in {root}; allowed endings: {', '.join(endings)}")

    def __getitem__(self, index: int, /) -> Any:
        return torchvision.datasets.folder.default_loader(self.paths[index])

    def __len__(self) -> int:
        return len(self.paths)
