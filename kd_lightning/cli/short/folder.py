"""The pictures of a folder: their classes and parts, and which ones can be read."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.image_files import IMAGE_ENDINGS, ClassFolders, FlatFolder, is_system_name
from kd_lightning.data.sources.image_loader import load_image, why_unreadable
from kd_lightning.data.sources.image_table import ImageTable
from kd_lightning.data.sources.images import path_of, printable
from kd_lightning.data.sources.source import Parts
from kd_lightning.errors import InputError

PARTS = ("train", "val", "test", "unlabeled")
_PART_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
_TABLES = (".csv", ".parquet")
_MOST = 5  # names in a message


@dataclass(frozen=True)
class Picture:
    """A picture of a folder.

    Attributes:
        path: Its path relative to the folder, with slashes.
        label: Name of its class; empty if it has none.
        part: One of ``PARTS``.
        weight: Factor of its hard loss, as a text; empty for 1.
    """

    path: str
    label: str
    part: str
    weight: str = ""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder that can be read.

    Attributes:
        root: The folder.
        pictures: The pictures, sorted by path.
        contents: Hash of the file of each picture, by path.
        side: Median short side in pixels.
        kind: What the folder is, such as ``"class folders"``.
        unreadable: Path and error of each picture that cannot be read.
    """

    root: Path
    pictures: list[Picture]
    contents: dict[str, str]
    side: int
    kind: str
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def counts(self, part: str) -> Counter[str]:
        """Number of pictures of each class in a part."""
        return Counter(picture.label for picture in self.pictures if picture.part == part)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of the training part in the order of their numbers: whole numbers by value."""
        names = {picture.label for picture in self.pictures if picture.part == "train"} - {""}
        if all(re.fullmatch("-?[0-9]+", name) for name in names):
            return sorted(names, key=lambda name: (int(name), name))
        return sorted(names)


def read_folder(folder: Path) -> Pictures:
    """Find the pictures of a folder, and read each one once.

    A folder has class folders; or ``train`` and others of ``PARTS`` that have class folders (``unlabeled`` has
    pictures); or pictures and one CSV or Parquet file of their labels, see
    :class:`~kd_lightning.data.sources.image_table.ImageTable`. ``folder`` may also be that file.

    Raises:
        InputError: If it is none of these, or no picture can be read.
    """
    root, found, kind = _find(folder)
    paths = [os.path.join(root, picture.path) for picture in found]  # noqa: PTH118  (there may be a million)
    with ThreadPoolExecutor() as pool:
        read = [*pool.map(_read, paths)]
    contents, sides, unreadable, good = {}, [], [], []
    for picture, (content, side, error) in zip(found, read, strict=True):
        if error:
            unreadable.append((picture.path, error))
            continue
        contents[picture.path] = content
        sides.append(side)
        good.append(picture)
    if not good:
        path, error = unreadable[0]
        raise InputError(f"{folder}: none of its {len(found)} pictures can be read ({printable(path)}: {error})")
    return Pictures(Path(root), good, contents, int(median(sides)), kind, unreadable)


def _read(path: str) -> tuple[str, int, str]:
    """Return the hash of a picture's file, its short side, and why it cannot be read; that is empty if it can."""
    try:
        data = Path(path).read_bytes()
        image = load_image(path)
        if isinstance(image, Image.Image):
            image.load()
            return hashlib.sha256(data).hexdigest(), min(image.size), ""
        return hashlib.sha256(data).hexdigest(), min(image.shape[-2:]), ""
    except Exception as error:  # decoders raise errors of any class
        return "", 0, why_unreadable(error, path)


def _find(folder: Path) -> tuple[str, list[Picture], str]:
    """Return the folder of the pictures, the pictures, and what the folder is."""
    if folder.is_file() and folder.suffix.lower() in _TABLES:
        return _of_table(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"FOLDER must be a folder of pictures or a table of their labels, {folder} {problem}")
    entries = [entry for entry in sorted(folder.iterdir()) if not is_system_name(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    tables = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in _TABLES]
    parts = {entry: part for entry in folders if (part := _PART_OF.get(entry.name.lower()))}
    has_pictures = any(entry.suffix.lower() in IMAGE_ENDINGS for entry in entries if entry not in folders)
    if "train" in parts.values() and len(parts) == len(folders):
        return str(folder), [*_of_parts(folder, parts)], "folders of parts"
    classes = [entry for entry in folders if parts.get(entry) != "unlabeled"]
    if tables and (has_pictures or len(classes) < 2):
        if len(tables) > 1:
            raise InputError(
                f"{folder} has several tables, {_some(t.name for t in tables)}; name one in place of FOLDER"
            )
        return _of_table(tables[0])
    if not classes:
        what = "pictures in no class folder, and no table" if has_pictures else "neither"
        raise InputError(f"{folder} must have a folder for each class, or pictures and a table of labels, got {what}")
    return str(folder), _of_classes(folder), "class folders"


def _of_classes(folder: Path) -> list[Picture]:
    found = ClassFolders("FOLDER", str(folder))
    pictures = []
    for path, number in found.samples:
        name = found.classes[number]
        unlabeled = _PART_OF.get(name.lower()) == "unlabeled"
        pictures.append(
            Picture(_relative(path, folder), "" if unlabeled else name, "unlabeled" if unlabeled else "train")
        )
    return _sorted(pictures)


def _of_parts(folder: Path, parts: dict[Path, str]) -> list[Picture]:
    if len({*parts.values()}) < len(parts):
        raise InputError(f"{folder} has two folders of one part: {_some(path.name for path in parts)}")
    pictures: list[Picture] = []
    classes: list[str] | None = None
    for path in sorted(parts, key=lambda path: parts[path] != "train"):  # its classes are those of all
        if parts[path] == "unlabeled":
            pictures += [
                Picture(_relative(one, folder), "", "unlabeled") for one in FlatFolder("unlabeled", str(path)).paths
            ]
            continue
        found = ClassFolders(parts[path], str(path), classes)
        classes = found.classes
        pictures += [Picture(_relative(one, folder), classes[k], parts[path]) for one, k in found.samples]
    return _sorted(pictures)


def _of_table(table: Path) -> tuple[str, list[Picture], str]:
    source = ImageTable(str(table))
    parts = source.load()
    pictures: list[Picture] = []
    for part in PARTS:
        pictures += _rows(parts, part, Path(source.folder))
    return source.folder, _sorted(pictures), f"pictures and {table.name}"


def _rows(parts: Parts, name: str, root: Path) -> Iterable[Picture]:
    if name == "unlabeled":
        pool = parts.unlabeled
        paths = [] if pool is None else [path_of([pool], n) for n in range(len(pool))]
        return [Picture(_relative(str(path), root), "", name) for path in paths]
    part = getattr(parts, name)
    if part is None:
        return []
    names, targets = parts.class_names, part.targets
    if targets.ndim != 1 or targets.is_floating_point() or names is None:
        raise InputError("FOLDER: the table must have one class for each picture; write a config for several labels")
    weights = [""] * len(targets) if part.weights is None else [f"{weight:g}" for weight in part.weights.tolist()]
    rows = []
    for number, (target, weight) in enumerate(zip(targets.tolist(), weights, strict=True)):
        path, known = _relative(str(path_of([part.images], number)), root), target != IGNORE_INDEX
        rows.append(Picture(path, names[target] if known else "", name if known else "unlabeled", weight))
    return rows


def split_test(
    pictures: Sequence[Picture], contents: dict[str, str], share: float, least: int, seed: int = 0
) -> set[str]:
    """Sample a test part of the training part, by class. Pictures of equal content stay together.

    Args:
        pictures: The pictures.
        contents: Hash of each picture's file, by path.
        share: Share of each class, in (0, 1).
        least: Classes with fewer pictures have none in the test part; at least 2.
        seed: Seed of the order.

    Returns:
        Paths of the test part.
    """
    generator = torch.Generator().manual_seed(seed)
    train = [picture for picture in pictures if picture.part == "train"]
    test: set[str] = set()
    for name in sorted({picture.label for picture in train}):
        copies: dict[str, list[str]] = {}
        for picture in train:
            if picture.label == name:
                copies.setdefault(contents[picture.path], []).append(picture.path)
        groups = [*copies.values()]
        if len(groups) < least:
            continue
        order = torch.randperm(len(groups), generator=generator).tolist()
        for number in order[: max(1, round(share * len(groups)))]:
            test.update(groups[number])
    return test


def _relative(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _sorted(pictures: Iterable[Picture]) -> list[Picture]:
    return sorted(pictures, key=lambda picture: picture.path)


def _some(names: Iterable[str]) -> str:
    names = [*map(printable, names)]
    return ", ".join(names[:_MOST]) + ", ..." * (len(names) > _MOST)
