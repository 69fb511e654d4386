"""Images that lie in memory as one tensor, which a whole batch is read from at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision import datasets

from kd_lightning.data.sources.images import Images, read_image
from kd_lightning.data.transforms.base import to_tensor
from kd_lightning.errors import InputError

_GREY = (datasets.MNIST,)  # (N, H, W), as its subclasses FashionMNIST, KMNIST and EMNIST
_CHANNELS_LAST = (datasets.CIFAR10,)  # (N, H, W, C), as its subclass CIFAR100
_CHANNELS_FIRST = (datasets.SVHN, datasets.STL10)
_CHECKED = 8
"""Number of images that are compared with those that the dataset returns."""


class Rows:
    """The images of a dataset in memory.

    Args:
        values: (M, C, H, W), the images of a tensor; a view of the dataset's own memory.
        places: (N,) row of each image. Default: None, which means that they are the rows in order.
    """

    def __init__(self, values: Tensor, places: Tensor | None = None) -> None:
        self.values = values
        self.places = places

    def __len__(self) -> int:
        return len(self.values if self.places is None else self.places)

    def read(self, index: Tensor) -> Tensor:
        """Return a copy of the images (B, ...) at these indices (B,)."""
        return self.values[index if self.places is None else self.places[index]].contiguous()


class JoinedRows:
    """The images of several datasets in memory, of one shape and type. Indices count through all of them.

    Args:
        parts: The images of each dataset.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.values = parts[0].values

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, index: Tensor) -> Tensor:
        """Return a copy of the images (B, ...) at these indices (B,)."""
        images = self.values.new_empty(len(index), *self.values.shape[1:])
        first = 0
        for part in self.parts:
            here = (index >= first) & (index < first + len(part))
            images[here] = part.read(index[here] - first)
            first += len(part)
        return images


def rows_of(parts: Sequence[Images]) -> Rows | JoinedRows | None:
    """Return the images of the parts of a source that lie in memory as tensors of one shape; None for any others.

    Some images are compared with those that the datasets return: one that changes its images has none.
    """
    parts = [one for part in parts for one in (part.datasets if type(part) is ConcatDataset else [part])]  # type: ignore[misc]
    found = [rows for rows in map(_rows_of_part, parts) if rows is not None]
    if len(found) != len(parts) or len({(rows.values.shape[1:], rows.values.dtype) for rows in found}) != 1:
        return None
    return found[0] if len(found) == 1 else JoinedRows(found)


def _rows_of_part(images: Images) -> Rows | None:
    rows = _find(images)
    if rows is None or len(rows) != len(images):
        return None
    for place in sorted({int(place) for place in np.linspace(0, len(rows) - 1, min(len(rows), _CHECKED))}):
        try:
            image = to_tensor(read_image([images], place))
        except (InputError, TypeError, ValueError):
            return None
        here = rows.read(torch.tensor([place]))[0]
        # numbers that are not equal to themselves (NaN) are compared by their bits
        if here.shape != image.shape or here.dtype != image.dtype or not torch.equal(_bits(here), _bits(image)):
            return None
    return rows


def _bits(image: Tensor) -> Tensor:
    return image.contiguous().reshape(-1).view(torch.uint8)


def _find(images: Any) -> Rows | None:
    if type(images) is Subset:
        rows = _find(images.dataset)
        index = torch.as_tensor([int(number) for number in images.indices], dtype=torch.long)
        return None if rows is None else Rows(rows.values, index if rows.places is None else rows.places[index])
    if type(images) is ConcatDataset and len(images.datasets) == 1:
        return _find(images.datasets[0])
    if type(images) is TensorDataset:
        return Rows(images.tensors[0])
    kinds = (*_GREY, *_CHANNELS_LAST, *_CHANNELS_FIRST)
    kind = next((kind for kind in kinds if isinstance(images, kind)), None)
    if kind is None or type(images).__getitem__ is not kind.__getitem__ or images.transforms is not None:
        return None  # a subclass may change any of its images
    data: Any = images.data
    values = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if isinstance(images, _GREY):
        return Rows(values.unsqueeze(1))
    return Rows(values.permute(0, 3, 1, 2) if isinstance(images, _CHANNELS_LAST) else values)
