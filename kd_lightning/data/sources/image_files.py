"""Folders of images: which files are samples, which folders are classes, and what is passed over."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from kd_lightning.data.sources.image_loader import Loader, load_image
from kd_lightning.data.sources.images import printable
from kd_lightning.data.sources.report_once import report_once
from kd_lightning.errors import InputError

IMAGE_ENDINGS: tuple[str, ...] = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".apng", ".avif")
"""Endings of image files, in lower case. A file's own may be in upper case."""

_SYSTEM_NAMES = {  # in lower case; names that start with a dot are system files, too
    "$recycle.bin",
    "#recycle",
    "@eadir",
    "@recycle",
    "@tmp",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
_SYSTEM = "system files and folders"
_NO_IMAGE = "files whose ending is that of no image"
_OUTSIDE = "images in no class folder"
_BROKEN = "broken links"
_CYCLE = "links to a folder that holds them"
_SPECIAL = "special files"
_ONE = {
    _SYSTEM: "system file or folder",
    _NO_IMAGE: "file whose ending is that of no image",
    _OUTSIDE: "image in no class folder",
    _BROKEN: "broken link",
    _CYCLE: "link to a folder that holds it",
    _SPECIAL: "special file",
}
"""The kinds where there is one."""
_EXAMPLES = 3

_Place = tuple[int, int]
"""Device and number of a folder, which are the same under each of its names."""


def is_system_name(name: str) -> bool:
    """Whether a file or folder of this name belongs to an operating system or a tool, and is no data."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


class ClassFolders(Dataset[Any]):
    """The images of a folder that has one subfolder for each class, at any depth; items are ``(image, class)``.

    Class names are compared and sorted in Unicode NFC. Images are sorted by folder, then by name, as in torchvision's
    ``ImageFolder``. Linked files and folders are followed. What is passed over, and which classes have no images, is
    logged once in a process.

    Args:
        part: Name of the part, for messages.
        root: The folder.
        classes: Names of the classes, in their order. Those that have no subfolder have no images. Default: None, which
            means the names of the subfolders.
        loader: Function from the path of a file to a picture.
        endings: Endings of image files, in lower case. A file's own may be in upper case.
        others: Folders that are no classes, also if they lie in this one.

    Attributes:
        root: The folder.
        classes: Names of the classes in Unicode NFC.
        samples: Path and class of each image.
        targets: Class of each image.
        passed_over: Number of files and folders that are no samples; a folder counts as one.

    Raises:
        InputError: If there is no subfolder or no image, or a subfolder is none of ``classes``, or cannot be read.
    """

    def __init__(
        self,
        part: str,
        root: str,
        classes: Sequence[str] | None = None,
        loader: Loader = load_image,
        endings: tuple[str, ...] = IMAGE_ENDINGS,
        others: Sequence[str] = (),
    ) -> None:
        self.root = os.path.expanduser(root)  # noqa: PTH111  (the paths start with the folder as given)
        self.loader = loader
        content = "a subfolder of images for each class"
        listing = _Listing(part, self.root, content, endings)
        folders = listing.class_folders(others)
        if not folders:
            hint = "; images without labels are unlabeled" if part == "train" else ""
            raise InputError(f"{part}: {root} must hold {content}, got no subfolder{hint}")
        self.classes = sorted(folders) if classes is None else [*classes]
        if extra := sorted(folders.keys() - {*self.classes}):
            raise InputError(
                f"{part}: classes must be those of train, {_some(self.classes)}, got another class {_some(extra)}"
            )
        self.samples = [
            (path, number)
            for number, name in enumerate(self.classes)
            for folder in folders.get(name, [])
            for path in listing.images_of_class(folder)
        ]
        self.targets = [number for _, number in self.samples]
        self.passed_over = listing.passed_over.total()
        if not self.samples:
            raise InputError(f"{part}: {root} must hold {content}, got no image; allowed endings: {', '.join(endings)}")
        listing.report()
        present = {*self.targets}
        if empty := [name for number, name in enumerate(self.classes) if number not in present]:
            report_once(f"{part}: {len(empty)} of {len(self.classes)} classes have no images in {root}: {_some(empty)}")

    def __getitem__(self, index: int, /) -> Any:
        path, target = self.samples[index]
        return self.loader(path), target

    def __len__(self) -> int:
        return len(self.samples)


def class_names(roots: Iterable[str]) -> list[str] | None:
    """Return the names of the class folders of some folders, sorted; None without any folder."""
    listings = [_Listing("val", str(Path(root).expanduser()), "a subfolder for each class", ()) for root in roots]
    return sorted({name for listing in listings for name in listing.class_folders()}) if listings else None


class FlatFolder(Dataset[Any]):
    """All images below a folder, at any depth, sorted by path; items are images.

    Linked files and folders are followed. What is passed over is logged once in a process.

    Args:
        part: Name of the part, for messages.
        root: The folder.
        loader: Function from the path of a file to a picture.
        endings: Endings of image files, in lower case. A file's own may be in upper case.

    Attributes:
        root: The folder.
        paths: Path of each image.
        passed_over: Number of files and folders that are no samples; a folder counts as one.

    Raises:
        InputError: If there is no image, or a folder cannot be read.
    """

    def __init__(
        self, part: str, root: str, loader: Loader = load_image, endings: tuple[str, ...] = IMAGE_ENDINGS
    ) -> None:
        self.root = str(Path(root).expanduser())
        self.loader = loader
        listing = _Listing(part, self.root, "images", endings)
        self.paths = sorted(listing.images())
        self.passed_over = listing.passed_over.total()
        if not self.paths:
            raise InputError(f"{part}: no images in {root}; allowed endings: {', '.join(endings)}")
        listing.report()

    def __getitem__(self, index: int, /) -> Any:
        return self.loader(self.paths[index])

    def __len__(self) -> int:
        return len(self.paths)


class _Listing:
    """The image files below a folder, and how many files and folders are passed over, by kind."""

    def __init__(self, part: str, root: str, content: str, endings: tuple[str, ...]) -> None:
        self.part = part
        self.root = root
        self.content = content
        self.endings = endings
        self.passed_over: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)

    def class_folders(self, others: Sequence[str] = ()) -> dict[str, list[str]]:
        """Paths of the class folders by name; two folders are one class if their names are equal in Unicode NFC.

        Args:
            others: Folders that are no classes. They need not exist.
        """
        found: dict[str, list[str]] = defaultdict(list)
        above = (self._place(self.root),)
        known = [Path(other).expanduser() for other in others]
        not_classes = {self._place(str(other)) for other in known if other.exists()}
        for entry in self._entries(self.root):
            if _is(entry.is_dir):
                if (place := self._place(entry.path)) in above:
                    self._pass_over(_CYCLE, entry.path)
                elif place not in not_classes:
                    found[unicodedata.normalize("NFC", entry.name)].append(entry.path)
            elif self._is_image(entry):
                self._pass_over(_OUTSIDE, entry.path)
        return found

    def images_of_class(self, folder: str) -> list[str]:
        """Paths of the images below a class folder, sorted by folder, then by name."""
        found = sorted(self._walk(folder, (self._place(self.root),)))
        return [os.path.join(place, name) for place, names in found for name in sorted(names)]  # noqa: PTH118

    def images(self) -> Iterator[str]:
        """Paths of the images below the root, in any order."""
        for place, names in self._walk(self.root, ()):
            yield from (os.path.join(place, name) for name in names)  # noqa: PTH118  (there may be a million)

    def report(self) -> None:
        """Log how many files and folders are passed over, with examples."""
        if self.passed_over:
            kinds = [
                f"{count} {_ONE[kind] if count == 1 else kind} ({self._named(kind)})"
                for kind, count in self.passed_over.items()
            ]
            report_once(f"{self.part}: {self.root}: passed over: {', '.join(kinds)}")

    def _walk(self, folder: str, above: tuple[_Place, ...]) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder with the names of its images; ``above`` are the folders that hold it."""
        above = (*above, self._place(folder))
        names, folders = [], []
        for entry in self._entries(folder):
            if _is(entry.is_dir):
                folders.append(entry.path)
            elif self._is_image(entry):
                names.append(entry.name)
        yield folder, names
        for inner in folders:
            if self._place(inner) in above:
                self._pass_over(_CYCLE, inner)
            else:
                yield from self._walk(inner, above)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Files and folders of a folder, sorted by name, without those of the system."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise self._error(error) from error
        data = []
        for entry in found:
            if is_system_name(entry.name):
                self._pass_over(_SYSTEM, entry.path)
            else:
                data.append(entry)
        return data

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry that is no folder is an image; others are counted."""
        if not _is(entry.is_file):
            self._pass_over(_BROKEN if entry.is_symlink() else _SPECIAL, entry.path)
        elif not entry.name.lower().endswith(self.endings):
            self._pass_over(_NO_IMAGE, entry.path)
        else:
            return True
        return False

    def _place(self, folder: str) -> _Place:
        try:
            status = os.stat(folder)  # noqa: PTH116
        except OSError as error:
            raise self._error(error) from error
        return status.st_dev, status.st_ino

    def _error(self, error: OSError) -> InputError:
        return InputError(f"{self.part}: {self.root} must hold {self.content}: {error}")

    def _pass_over(self, kind: str, path: str) -> None:
        self.passed_over[kind] += 1
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(os.path.relpath(path, self.root))

    def _named(self, kind: str) -> str:
        return ", ".join(map(printable, self.examples[kind])) + ", ..." * (self.passed_over[kind] > _EXAMPLES)


def _is(test: Callable[[], bool]) -> bool:
    """Result of ``is_dir`` or ``is_file``; False for a link that leads to itself."""
    try:
        return test()
    except OSError:
        return False


def _some(names: Iterable[str]) -> str:
    """Up to ten names."""
    names = [*map(printable, names)]
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)
