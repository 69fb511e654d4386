"""Which image of a folder a table means by a path or an address."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from urllib.parse import unquote, urlsplit

from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.sources.image_files import FlatFolder

_LOCAL = "/local-files/?d="  # Label Studio's address of a file in its folder
_UPLOADED = re.compile(r"/upload/[0-9]+/[0-9a-f]{8}-([^/]+)$")  # Label Studio's of an uploaded file


class ImageNames:
    """Find the images that the cell of a table may mean.

    Args:
        files: The images.
    """

    def __init__(self, files: FlatFolder) -> None:
        self._whole: dict[str, set[str]] = defaultdict(set)
        self._ends: dict[str, set[str]] = defaultdict(set)
        self._valid: dict[str, set[str]] = defaultdict(set)
        relative = [normal_name(relative_path(path, files)).split("/") for path in files.paths]
        self._folders = {parts[0] for parts in relative if len(parts) > 1}
        for path, parts in zip(files.paths, relative, strict=True):
            self._valid[_valid_name(parts[-1])].add(path)
            for number in range(len(parts)):
                end = "/".join(parts[number:])
                for name in (end, os.path.splitext(end)[0]):  # noqa: PTH122
                    self._ends[name].add(path)
                    if number == 0:
                        self._whole[name].add(path)

    def find(self, cell: str) -> set[str]:
        """Return the images whose path is the cell's, ends with it, or is the end of it: the first of these that fits.

        An end of both is not enough: ``val/1.jpg`` is not ``train/1.jpg``, nor ``1.jpg`` if there is a folder ``val``.
        The name of a file that was uploaded to Label Studio is compared without the prefix that it has there.
        """
        for text in dict.fromkeys(_paths(cell)):
            if fits := self._find_path(text):
                return fits
            if uploaded := _UPLOADED.search(text):
                name = normal_name(uploaded[1])
                return self._ends.get(name) or self._valid.get(_valid_name(name)) or set()
        return set()

    def _find_path(self, text: str) -> set[str]:
        parts = [part for part in normal_name(text).replace("\\", "/").split("/") if part not in ("", ".")]
        name = "/".join(parts)
        above = (number for number in range(1, len(parts)) if self._folders.isdisjoint(parts[:number]))
        ends = (self._whole.get("/".join(parts[number:])) for number in above)
        return self._whole.get(name) or self._ends.get(name) or next(filter(None, ends), set())


def relative_path(path: str, files: FlatFolder) -> str:
    """Return the path of an image relative to its folder, with slashes."""
    return os.path.relpath(path, files.root).replace(os.sep, "/")


def _paths(cell: str) -> list[str]:
    """Return the paths that a cell may mean: itself, or that of an address, as it is and without escapes."""
    if local := cell.partition(_LOCAL)[2]:
        return [local, unquote(local)]
    try:
        path = urlsplit(cell).path
    except ValueError:
        return [cell]
    return [path, unquote(path)] if "://" in cell else [cell, unquote(path)]


def _valid_name(name: str) -> str:
    """Return the name that an uploaded file has: Django replaces spaces, and leaves out other special characters."""
    return re.sub(r"[^-\w.]", "", name.replace(" ", "_"))
