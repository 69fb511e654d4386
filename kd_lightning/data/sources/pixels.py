"""The raw pixels of an item, for whole-batch transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from kd_lightning.data.sources.image_files import ClassFolders, FlatFolder
from kd_lightning.data.sources.image_loader import decode_image, load_image
from kd_lightning.data.sources.image_table import ListedImages
from kd_lightning.data.sources.images import Images, part_of, path_of, read_image, unreadable
from kd_lightning.data.sources.mask_files import MaskFiles
from kd_lightning.data.sources.torchvision_files import TorchvisionFiles
from kd_lightning.data.transforms.base import to_tensor
from kd_lightning.errors import InputError
from kd_lightning.inputs import describe

_OF_FILES = (ClassFolders, FlatFolder, ListedImages, MaskFiles, TorchvisionFiles)


class DecodedImages(ABC):
    """The images of a part, whose pixels are read without decoding.

    Attributes:
        part: The part, whose files are decoded.
    """

    part: Images

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> Any:
        """Return an image as the loader returns it."""

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """Return an image as uint8 (C, H, W)."""


def read_pixels(parts: Sequence[Images], index: int) -> Tensor:
    """Read the pixels of an item; the index counts through all parts.

    Args:
        parts: The parts of a source.
        index: Index of the item.

    Returns:
        (C, H, W) of the type of the image: uint8 for files and pictures of 8 bits. A tensor is returned as it is; an
        array of one dimension, which is no picture, as (D,). Files that no loader, dataset or transform of the user
        reads are decoded by :func:`~kd_lightning.data.sources.image_loader.decode_image`.

    Raises:
        InputError: If it cannot be read, if the item has no image, or if it has several inputs. The message names the
            item.
    """
    part, index = part_of(parts, index)
    if isinstance(part, DecodedImages):
        return part.pixels(index)
    path = _file_of(part, index)
    if path is not None:
        return decode_image(path)
    return to_pixels(read_image([part], index), part, index)


def to_pixels(image: Any, part: Images, index: int) -> Tensor:
    """Return the image of an item that was read as a tensor (C, H, W), see :func:`read_pixels`."""
    if isinstance(image, Mapping | tuple | list):
        raise InputError(
            f"whole-batch transforms take images alone, but the inputs of item {index} of {type(part).__name__} are "
            f"{describe(image)}; a transform of one sample, such as an nn.Module of yours, takes all of them"
        )
    try:
        return row_of(image) if isinstance(image, np.ndarray) and image.ndim == 1 else to_tensor(image)
    except Exception as error:  # no image at all
        raise unreadable(part, index, error) from error


def row_of(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array (D,), such as a row of a table or an embedding, as a tensor; float64 as torch's default type."""
    native = np.array(array, array.dtype.newbyteorder("="))  # torch has neither other byte orders nor negative strides
    row = torch.from_numpy(native)
    return row.to(torch.get_default_dtype()) if row.dtype == torch.float64 else row


def _file_of(images: Images, index: int) -> str | None:
    """The file whose picture, as ``load_image`` returns it, is the image of an item; None for any other item.

    Subclasses are left out: they may return another image.
    """
    try:
        if type(images) is Subset:
            return _file_of(images.dataset, int(images.indices[index]))  # type: ignore[arg-type]
        if type(images) is ConcatDataset:
            return _file_of(*part_of(images.datasets, index))  # type: ignore[arg-type]
        if type(images) is TorchvisionFiles and images.transforms is not None:
            return None
        if type(images) in _OF_FILES and images.loader is load_image:  # type: ignore[attr-defined]
            return path_of([images], index)
    except IndexError:  # read_image names the item
        pass
    return None
