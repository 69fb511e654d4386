"""Read images, paths and hashes of any kind of dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from kd_lightning.cache.content import fingerprint
from kd_lightning.errors import InputError

# attributes of torchvision's datasets with pixels and paths (hashed separately), labels, and the folder
_HASHED_APART = {"data", "tensors", "samples", "imgs", "paths", "_image_files", "targets", "labels", "_labels", "root"}


class Images(Protocol):
    """Any map-style dataset whose items are images, or tuples that start with an image."""

    def __getitem__(self, index: int, /) -> Any: ...
    def __len__(self) -> int: ...


def read_item(images: Images, index: int) -> Any:
    """Read one item.

    Raises:
        InputError: If it cannot be read. The message names the item, by path if the dataset has paths.
    """
    try:
        return images[index]
    except Exception as error:  # decoders raise errors of any class
        path = path_of([images], index)
        where = f"item {index} of {type(images).__name__}" if path is None else f"image {path}"
        raise InputError(f"{where} cannot be read: {type(error).__name__}: {error}") from error


def _part_of(parts: Sequence[Images], index: int) -> tuple[Images, int]:
    """The part of an index that counts through all parts, and the index within that part."""
    for part in parts:
        if index < len(part):
            return part, index
        index -= len(part)
    raise IndexError(index)


def read_image(parts: Sequence[Images], index: int) -> Any:
    """Read the image of an item; the index counts through all parts."""
    item = read_item(*_part_of(parts, index))
    return item[0] if isinstance(item, tuple | list) else item


def path_of(parts: Sequence[Images], index: int) -> str | None:
    """The path of an item's file; None if the dataset has no paths. The index counts through all parts."""
    images, index = _part_of(parts, index)
    if isinstance(images, Subset):
        return path_of([images.dataset], int(images.indices[index]))  # type: ignore[list-item]
    listed = [getattr(images, name, None) for name in ("samples", "paths", "_image_files")]
    path = next((paths[index] for paths in listed if isinstance(paths, list)), None)
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


def contents(images: Images) -> str:
    """SHA-256 of all that the images depend on. Unlike ``identity``, it changes if a file is replaced.

    For torchvision's datasets it covers values or paths, file sizes and times, and options. For other datasets it
    covers their code and attributes, size and time of every file that they name, and 32 of their images.
    """
    if type(images) is Subset:
        inner = contents(images.dataset)  # type: ignore[arg-type]
        return hashlib.sha256(f"{inner} {[*map(int, images.indices)]}".encode()).hexdigest()
    if type(images) is TensorDataset:
        return identity(images)
    if type(images).__module__.startswith("torchvision.datasets."):
        state = {key: value for key, value in vars(images).items() if key not in _HASHED_APART}
        if isinstance(getattr(images, "data", None), Tensor | np.ndarray):
            return fingerprint([identity(images), state])
        paths = [path_of([images], number) for number in range(len(images))]
        if paths and None not in paths:
            return fingerprint([identity(images), state, [*map(_size_and_time, map(str, paths))]])
    selected = np.linspace(0, len(images) - 1, num=min(len(images), 32)).astype(int)
    with isolate_rng():
        read = [read_image([images], int(number)) for number in selected]
    files = sorted({*_find_files(images, ("",), set())})
    return fingerprint([images, [*map(_size_and_time, files)], read])


def _size_and_time(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _find_files(thing: Any, roots: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """Files that a dataset names, relative to the working directory or to a folder that it names."""
    if isinstance(thing, str | Path):
        places = (os.path.join(root, thing) for root in roots)  # noqa: PTH118  (there may be a million)
        yield from filter(os.path.isfile, places)
    elif id(thing) not in seen and isinstance(thing, Dataset | Mapping | list | tuple | set):
        seen.add(id(thing))
        parts = [*vars(thing).values()] if isinstance(thing, Dataset) else []
        roots += tuple(str(part) for part in parts if isinstance(part, str | Path) and Path(part).is_dir())
        parts += [*thing.values()] if isinstance(thing, Mapping) else []
        parts += thing if isinstance(thing, list | tuple | set) else []
        for part in parts:
            yield from _find_files(part, roots, seen)
