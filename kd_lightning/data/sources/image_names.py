"""Which image of a folder a table means by a path or an address."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.sources.image_files import FlatFolder

_LOCAL = "/local-files/?d="  # Label Studio's address of a file in its folder
_UPLOADED = re.compile(r"/upload/[0-9]+/[0-9a-f]{8}-([^/]+)$")  # Label Studio's of an uploaded file

_MOST = 10  # images of one name that are worth a message
_Table = dict[str, tuple[str, ...]]


class ImageNames:
    """Find the images that the cell of a table may mean.

    Args:
        files: The images.
    """

    def __init__(self, files: FlatFolder) -> None:
        self._whole: _Table = {}
        self._ends: _Table = {}
        self._valid: _Table = {}
        self._folders: set[str] = set()
        for path in files.paths:
            one, parts = (path,), normal_name(relative_path(path, files)).split("/")
            self._folders.update(parts[:-1][:1])
            if (valid := _valid_name(parts[-1])) != parts[-1]:
                _note(self._valid, valid, one)
            for number in range(len(parts)):
                end = "/".join(parts[number:])
                for name in (end, os.path.splitext(end)[0]):  # noqa: PTH122
                    _note(self._ends, name, one)
                    if number == 0:
                        _note(self._whole, name, one)

    def find(self, cell: str) -> tuple[str, ...]:
        """Return the images whose path is the cell's, ends with it, or is the end of it: the first of these that fits.

        An end of both is not enough: ``val/1.jpg`` is not ``train/1.jpg``, nor ``1.jpg`` if there is a folder ``val``.
        The name of a file that was uploaded to Label Studio is compared without the prefix that it has there. Of many
        images that fit, a few are returned.
        """
        for text in dict.fromkeys(_paths(cell)):
            if fits := self._find_path(text):
                return fits
            if uploaded := _UPLOADED.search(text):
                name = normal_name(uploaded[1])
                return self._ends.get(name) or self._valid.get(name) or ()
        return ()

    def _find_path(self, text: str) -> tuple[str, ...]:
        parts = [part for part in normal_name(text).replace("\\", "/").split("/") if part not in ("", ".")]
        name = "/".join(parts)
        above = (number for number in range(1, len(parts)) if self._folders.isdisjoint(parts[:number]))
        ends = (self._whole.get("/".join(parts[number:])) for number in above)
        return self._whole.get(name) or self._ends.get(name) or next(filter(None, ends), ())


def _note(table: _Table, name: str, one: tuple[str]) -> None:
    known = table.setdefault(name, one)  # of a million images, a set for each name would take gigabytes
    if known is not one and one[0] not in known and len(known) <= _MOST:
        table[name] = known + one


def relative_path(path: str, files: FlatFolder) -> str:
    """Return the path of an image relative to its folder, with slashes."""
    return path.removeprefix(os.path.join(files.root, "")).replace(os.sep, "/")  # noqa: PTH118


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
