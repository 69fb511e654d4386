"""Labels and class names of map-style datasets, for the sources of this room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kd_lightning.data.sources.images import read_item
from kd_lightning.data.sources.source import Part
from kd_lightning.errors import InputError


def dataset_part(dataset: Any) -> Part:
    """A map-style dataset of (image, label) items as a part of a source."""
    return Part(dataset, read_targets(dataset))


def read_targets(dataset: Any) -> Tensor:
    """The labels of a dataset; its images are loaded only if it has no attribute with the labels."""
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            raise InputError("a labeled part must be a dataset of (image, label), got a TensorDataset of one tensor")
        found: Any = dataset.tensors[1]
    else:
        names = ("targets", "labels", "_labels")
        found = next((getattr(dataset, name) for name in names if hasattr(dataset, name)), None)
    if found is None or len(found) != len(dataset):
        found = [read_item(dataset, index)[1] for index in range(len(dataset))]
    if isinstance(found, list | tuple):
        found = torch.stack(list(found)) if found and isinstance(found[0], Tensor) else torch.tensor(found)
    targets = torch.as_tensor(found)
    return targets if targets.is_floating_point() else targets.long()


def class_names_of(dataset: Any) -> list[str] | None:
    """The dataset's ``classes``, if it has them."""
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None
