"""Pictures and their masks as files: which mask belongs to which picture, and how it is read."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.sources.image_files import FlatFolder
from kd_lightning.data.sources.image_loader import load_image, size_and_turn
from kd_lightning.data.sources.images import printable
from kd_lightning.data.sources.report_once import report_once
from kd_lightning.errors import InputError

IMAGES, MASKS = "images", "masks"
"""Names of the subfolders of a part."""
_FACTORS = {(0, 2): 85, (0, 4): 17}
"""By colour type and bits of a PNG: what Pillow multiplies its values with, as for brightnesses."""


class MaskFiles(Dataset[Any]):
    """Pictures of the folder ``images``, and their masks of the folder ``masks``; items are ``(picture, mask)``.

    A mask is a PNG of class numbers, grey or with a palette, with the path of its picture but for the ending. A picture
    without one has the mask None.

    Args:
        part: Name of the part, for messages.
        root: Folder with both subfolders.

    Attributes:
        root: The folder.
        paths: Path of each picture.
        mask_paths: Path of each mask; None for none.
        loader: Reads a picture.
        passed_over: Number of files and folders that are no samples.

    Raises:
        InputError: If a subfolder is missing or has no files, if two pictures or two masks have the same name but for
            the ending, or if a mask is no PNG or has no picture.
    """

    def __init__(self, part: str, root: str) -> None:
        self.root = str(Path(root).expanduser())
        self.loader = load_image
        pictures, masks = (FlatFolder(part, os.path.join(self.root, name)) for name in (IMAGES, MASKS))  # noqa: PTH118
        self.paths = pictures.paths
        self.passed_over = pictures.passed_over + masks.passed_over
        stems, mask_of = (_by_stem(part, folder.root, folder.paths) for folder in (pictures, masks))
        for stem, path in mask_of.items():
            if not path.lower().endswith(".png"):
                raise InputError(f"{part}: masks must be PNG, which keeps class numbers exact, got {printable(path)}")
            if stem not in stems:
                raise InputError(
                    f"{part}: mask {printable(path)} has no picture; {IMAGES}/ must have a file of the same name but "
                    "for the ending"
                )
        self._turns: dict[int, tuple[tuple[int, int], Any]] = {}  # known ones: of a PNG, they take a decoding
        self.mask_paths = [mask_of.get(stem) for stem in stems]
        if None in self.mask_paths:
            missing = self.mask_paths.count(None)
            report_once(f"{part}: {missing} of {len(self.paths)} pictures in {self.root} have no mask: unlabeled")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Any:
        return self.picture(index), self.mask(index)

    def picture(self, index: int) -> Any:
        """Read a picture, turned as its EXIF orientation states."""
        return self.loader(self.paths[index])

    def name(self, index: int) -> str:
        """Return the name of a mask for messages."""
        return f"mask {printable(self.mask_paths[index] or '')}"

    def mask(self, index: int) -> Tensor | None:
        """Read a mask (H, W), int64, of the size of the picture; None if there is none.

        A mask that was drawn on a picture before the turn of its EXIF orientation is turned, too.

        Raises:
            InputError: If it cannot be read, has another size, or is a colour picture.
        """
        path, picture = self.mask_paths[index], self.paths[index]
        if path is None:
            return None
        mask = read_mask(path)
        if index not in self._turns:
            self._turns[index] = size_and_turn(picture)
        (height, width), turn = self._turns[index]
        seen = (width, height) if turn in _SWAPS else (height, width)
        if turn is not None and mask.shape == (height, width):
            if mask.shape == seen:  # both readings are possible
                _warn_once(
                    f"image {printable(picture)} is turned by its EXIF orientation; its mask, and others alike, is "
                    "read as drawn on the turned picture, which its size does not decide"
                )
            else:
                mask = np.array(Image.fromarray(mask.astype(np.int32)).transpose(turn))
        if mask.shape != seen:
            raise InputError(
                f"mask {printable(path)} must have the size of its picture, {seen[1]} x {seen[0]}, got "
                f"{mask.shape[1]} x {mask.shape[0]}"
            )
        return torch.from_numpy(mask.astype(np.int64))


_SWAPS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
"""Turns that exchange height and width."""


def read_mask(path: str) -> np.ndarray[Any, Any]:
    """Read a PNG of class numbers (H, W), grey or with a palette, of up to 16 bits.

    Raises:
        InputError: If it cannot be read, or is a colour picture. The message names the file.
    """
    try:
        with Path(path).open("rb") as file:
            bits, kind = file.read(26)[24:26]
            file.seek(0)
            with Image.open(file) as image:
                values, mode, kind_of_file = np.array(image), image.mode, image.format
    except Exception as error:  # decoders raise errors of any class
        raise InputError(f"mask {printable(path)} cannot be read: {type(error).__name__}: {error}") from error
    if kind_of_file != "PNG":
        raise InputError(f"mask {printable(path)} must be PNG, which keeps class numbers exact, got {kind_of_file}")
    if values.ndim != 2:
        raise InputError(
            f"mask {printable(path)} must be a picture of class numbers, grey or with a palette, got a colour picture "
            f"of mode {mode}"
        )
    return values // _FACTORS.get((kind, bits), 1)


def _by_stem(part: str, root: str, paths: Iterable[str]) -> dict[str, str]:
    """Return paths by their name below a folder, without the ending."""
    found: dict[str, str] = {}
    for path in paths:
        stem = unicodedata.normalize("NFC", os.path.splitext(os.path.relpath(path, root))[0])  # noqa: PTH122
        if stem in found:
            raise InputError(
                f"{part}: {printable(found[stem])} and {printable(path)} have one name but for the ending, so that "
                "which mask belongs to which picture is not known"
            )
        found[stem] = path
    return found


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    """Warn once in a process."""
    if not _warned:
        _warned.add(text)
        rank_zero_warn(text)
