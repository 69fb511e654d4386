"""Read images, paths and hashes of any kind of dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from kd_lightning.data.sources.items import Entries, image_of
from kd_lightning.errors import InputError


class Images(Protocol):
    """Any map-style dataset whose items have inputs, see :func:`~kd_lightning.data.sources.items.image_of`."""

    def __getitem__(self, index: int, /) -> Any: ...
    def __len__(self) -> int: ...


def read_item(images: Images, index: int) -> Any:
    """Read one item.

    Raises:
        InputError: If it cannot be read. The message names the item, by path if the dataset has paths.
    """
    try:
        return images[index]
    except InputError:  # it names the item
        raise
    except Exception as error:  # decoders raise errors of any class
        raise unreadable(images, index, error) from error


def unreadable(images: Images, index: int, error: Exception) -> InputError:
    """Return the error of an item that cannot be read. It names the item, by path if the dataset has paths."""
    try:
        path = path_of([images], index)
    except IndexError:  # a Subset of items that do not exist
        path = None
    where = f"item {index} of {type(images).__name__}" if path is None else f"image {printable(path)}"
    return InputError(f"{where} cannot be read: {type(error).__name__}: {error}")


def printable(path: str | Path) -> str:
    r"""Return a path or name for a message, with line ends, control characters and broken text as escapes.

    >>> printable("a\n.png")
    'a\\n.png'
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(path))


def part_of(parts: Sequence[Images], index: int) -> tuple[Images, int]:
    """Return the part of an index that counts through all parts, and the index within that part.

    Raises:
        IndexError: If no part has the index.
    """
    if index < 0:  # from the end, as in a ConcatDataset
        index += sum(map(len, parts))
    for part in parts if index >= 0 else ():
        if index < len(part):
            return part, index
        index -= len(part)
    raise IndexError(index)


def read_image(parts: Sequence[Images], index: int) -> Any:
    """Read the image of an item, or its inputs if there are several; the index counts through all parts.

    A PIL image with a palette becomes RGB: its values are numbers of colours, which transforms would take for greys.

    Raises:
        InputError: If it cannot be read, or if the item has no image. The message names the item.
    """
    part, index = part_of(parts, index)
    return inputs_of(read_item(part, index), part, index)


def inputs_of(item: Any, part: Images, index: int) -> Any:
    """Return the image of an item that was read, or its inputs if there are several, as :func:`read_image` does."""
    return _decode(image_of(item, f"item {index} of {type(part).__name__}"), part, index)


def _decode(image: Any, part: Images, index: int) -> Any:
    if isinstance(image, Mapping):
        decoded = {name: _decode(value, part, index) for name, value in image.items()}
        return Entries(decoded) if isinstance(image, Entries) else decoded
    if type(image) is tuple:
        return tuple(_decode(value, part, index) for value in image)
    if not isinstance(image, Image.Image):
        return image
    try:
        image.load()  # a file may be open, but not decoded
        return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image
    except Exception as error:
        raise unreadable(part, index, error) from error


def has_several_inputs(images: Images, index: int) -> bool:
    """Whether an item of a user's dataset has a mapping or tuple of inputs. Other datasets have one image."""
    if isinstance(images, Subset):
        return has_several_inputs(images.dataset, int(images.indices[index]))  # type: ignore[arg-type]
    if isinstance(images, ConcatDataset):
        return has_several_inputs(*part_of(images.datasets, index))  # type: ignore[arg-type]
    if isinstance(images, TensorDataset) or type(images).__module__.startswith(("kd_lightning.", "torchvision.")):
        return bool(getattr(images, "has_several_inputs", False))
    return isinstance(read_image([images], index), Mapping | tuple | list)


def path_of(parts: Sequence[Images], index: int) -> str | None:
    """The path of an item's file; None if the dataset has no paths. The index counts through all parts."""
    images, index = part_of(parts, index)
    if isinstance(images, Subset):
        return path_of([images.dataset], int(images.indices[index]))  # type: ignore[list-item]
    if isinstance(images, ConcatDataset):
        return path_of(images.datasets, index)  # type: ignore[arg-type]
    listed = [getattr(images, name, None) for name in ("samples", "paths", "_image_files")]
    # a list of another length does not name the items
    path = next((paths[index] for paths in listed if isinstance(paths, list) and len(paths) == len(images)), None)
    path = path[0] if isinstance(path, tuple | list) and path else path
    return str(path) if isinstance(path, str | Path) else None


def identity(images: Images) -> str:
    """SHA-256 of a dataset's images: of their values if they are in memory, else of their number and paths.

    Paths are relative to their common folder, so that a moved dataset has the same hash.
    """
    digest = hashlib.sha256(f"{type(images).__name__} {len(images)}".encode())
    if isinstance(images, Subset):
        digest.update(f"{identity(images.dataset)} {[*map(int, images.indices)]}".encode())  # type: ignore[arg-type]
        return digest.hexdigest()
    values = images.tensors[0] if isinstance(images, TensorDataset) else getattr(images, "data", None)
    if isinstance(values, Tensor):
        values = values.cpu().flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
    if isinstance(values, np.ndarray):
        digest.update(np.ascontiguousarray(values).data)
    elif path_of([images], 0) is not None:
        paths = [str(path_of([images], n)) for n in range(len(images))]
        folder = os.path.commonprefix(paths).rpartition(os.sep)[0]  # noqa: RUF071  (up to a separator)
        digest.update("\n".join(path.removeprefix(folder) for path in paths).encode())
    return digest.hexdigest()
