"""The image files of torchvision's datasets, read by a loader in place of the dataset's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from kd_lightning.data.sources.image_files import IMAGE_ENDINGS, is_system_name
from kd_lightning.data.sources.image_loader import Loader
from kd_lightning.errors import InputError

_PAIRS = ("samples", "_samples", "imgs")  # lists of (path, class)
_PATHS = {"_image_files": "_labels", "data": "targets"}  # lists of paths, and their lists of classes


def open_files(dataset: Any, loader: Loader) -> TorchvisionFiles | None:
    """Return the dataset with its image files read by a loader; None if its images lie in memory or in an archive.

    Omniglot stays as it is: its drawings have one channel.

    Raises:
        InputError: If the dataset took a folder of the system for one of its own.
    """
    found = _files_of(dataset)
    if found is None:
        return None
    paths, labels = found
    return TorchvisionFiles(dataset, [*map(str, paths)], labels, loader)


class TorchvisionFiles(Dataset[Any]):
    """A dataset of torchvision whose image files are read by a loader; items are ``(image, label)``.

    Transforms of the dataset are applied. System files are passed over; their number is logged.

    Args:
        dataset: The dataset.
        paths: Path of each of its images.
        labels: Label of each of its images, before its transforms.
        loader: Function from the path of a file to a picture.

    Attributes:
        root: Folder of the dataset.
        paths: Path of each image.
        targets: Label of each image; the attribute is missing if the dataset transforms them.
        classes: Names of the classes, if the dataset has them.
        passed_over: Number of files that are no samples.

    Raises:
        InputError: If the dataset took a folder of the system for one of its own.
    """

    def __init__(self, dataset: Any, paths: Sequence[str], labels: Sequence[Any], loader: Loader) -> None:
        self.root = os.path.abspath(dataset.root)  # noqa: PTH100  (resolve() follows links)
        self.loader = loader
        self.transforms = getattr(dataset, "transforms", None)
        system = [self._is_system_file(path) for path in paths]
        self.paths = [path for path, is_system in zip(paths, system, strict=True) if not is_system]
        self._raw_labels = [label for label, is_system in zip(labels, system, strict=True) if not is_system]
        self.passed_over = sum(system)
        if self.transforms is None:
            self.targets = self._raw_labels
        if (names := _class_names(dataset)) is not None:
            self.classes = names
        if self.passed_over:
            example = paths[system.index(True)]
            rank_zero_info(f"{type(dataset).__name__}: passed over: {self.passed_over} system files ({example})")

    def __getitem__(self, index: int, /) -> Any:
        image, label = self.loader(self.paths[index]), self._raw_labels[index]
        return (image, label) if self.transforms is None else self.transforms(image, label)

    def __len__(self) -> int:
        return len(self.paths)

    def _is_system_file(self, path: str) -> bool:
        start, whole = self.root.rstrip(os.sep) + os.sep, os.path.abspath(path)  # noqa: PTH100
        inner = whole[len(start) :] if whole.startswith(start) else os.path.basename(path)  # noqa: PTH119
        *folders, name = inner.split(os.sep)  # noqa: PTH206  (there may be a million)
        if system := [*filter(is_system_name, folders)]:
            raise InputError(f"{self.root} must hold no folder {system[0]}, which is no class, got {path}; remove it")
        return is_system_name(name)


def _files_of(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """Paths and labels of a dataset's image files; None if it has none, or several labels for each."""
    special = _SPECIAL.get(type(dataset).__name__)
    found = _listed(dataset) if special is None else special(dataset)
    if found is None or not len(found[0]):
        return None
    first = found[0][0]
    return found if isinstance(first, str | Path) and str(first).lower().endswith(IMAGE_ENDINGS) else None


def _listed(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    for name in _PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and pairs and isinstance(pairs[0], tuple) and len(pairs[0]) == 2:
            return [path for path, _ in pairs], [label for _, label in pairs]
    for name, labels in _PATHS.items():
        paths = getattr(dataset, name, None)
        if isinstance(paths, list) and len(getattr(dataset, labels, ())) == len(paths):
            return paths, getattr(dataset, labels)
    return None


def _pets(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    labels = {"category": dataset._labels, "binary-category": dataset._bin_labels}
    kinds = dataset._target_types
    return (dataset._images, labels[kinds[0]]) if len(kinds) == 1 and kinds[0] in labels else None


def _caltech101(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    folder = Path(dataset.root, "101_ObjectCategories")
    places = zip(dataset.y, dataset.index, strict=True)
    paths = [folder / dataset.categories[label] / f"image_{number:04d}.jpg" for label, number in places]
    return (paths, dataset.y) if dataset.target_type == ["category"] else None


def _caltech256(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    folder = Path(dataset.root, "256_ObjectCategories")
    places = zip(dataset.y, dataset.index, strict=True)
    paths = [folder / dataset.categories[label] / f"{label + 1:03d}_{number:04d}.jpg" for label, number in places]
    return paths, dataset.y


def _celeb_a(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    labels = {
        "attr": dataset.attr,
        "identity": dataset.identity[:, 0],
        "bbox": dataset.bbox,
        "landmarks": dataset.landmarks_align,
    }
    folder = Path(dataset.root, dataset.base_folder, "img_align_celeba")
    kinds = dataset.target_type
    return ([folder / name for name in dataset.filename], [*labels[kinds[0]]]) if len(kinds) == 1 else None


def _inaturalist(dataset: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    if len(dataset.target_type) != 1:
        return None
    kind = dataset.target_type[0]
    paths = [Path(dataset.root, dataset.all_categories[number], name) for number, name in dataset.index]
    return paths, [n if kind == "full" else dataset.categories_map[n][kind] for n, _ in dataset.index]


def _class_names(dataset: Any) -> Any:
    """Return the names of a dataset's classes; None if it has none."""
    name = type(dataset).__name__
    if name == "OxfordIIITPet" and dataset._target_types == ["binary-category"]:
        return dataset.bin_classes
    if name == "INaturalist":  # class numbers follow from the folders that are there
        (kind,) = dataset.target_type
        return dataset.all_categories if kind == "full" else [*dataset.categories_index[kind]]
    return getattr(dataset, "classes", None)


_SPECIAL = {
    "OxfordIIITPet": _pets,
    "Caltech101": _caltech101,
    "Caltech256": _caltech256,
    "CelebA": _celeb_a,
    "INaturalist": _inaturalist,
}
