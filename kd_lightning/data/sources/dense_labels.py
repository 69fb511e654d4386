"""Dense labels: one for each position of a sample, such as a mask of a picture, or a label for each token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.data.sources.images import Images, inputs_of, part_of, read_image, read_item
from kd_lightning.data.sources.items import label_of
from kd_lightning.data.sources.mask_files import MaskFiles
from kd_lightning.data.sources.pixels import DecodedImages, read_pixels, to_pixels
from kd_lightning.data.sources.source import Part
from kd_lightning.data.sources.targets import is_missing
from kd_lightning.data.transforms.base import plain
from kd_lightning.data.transforms.masks import resize_masks
from kd_lightning.errors import InputError

_CLASS_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of PIL; F holds values
_MANY = 20_000
"""Number of items from which on the reading is announced."""
_CHECKED = 128
"""Number of items that are read twice, to find out whether a dataset is random."""


@dataclass(frozen=True)
class LabelRules:
    """How a dataset's labels become those of a batch.

    Attributes:
        classes: Number of classes. None if it is unknown.
        void: Class number that means no label, beside -1 and -100. None for no other.
    """

    classes: int | None = None
    void: int | None = None

    def convert(self, label: Any, place: str) -> Tensor | None:
        """Return the labels of a sample: class numbers as int64 with -100 for none, or floats with NaN for none.

        Args:
            label: A picture of class numbers (grey or palette), a tensor, array or list of numbers; None for none.
            place: Name of the sample, for messages.

        Raises:
            InputError: If the label has no positions, is a colour picture or is none of the classes.
        """
        if is_missing(label):
            return None
        values = _to_numbers(label, place)
        if values.ndim == 0 or not values.numel():
            raise InputError(
                f"dense: {place} must have a label for each position, such as a mask (H, W), got {label!r:.60}"
            )
        if values.is_floating_point():
            return values.float()
        values = values.long()
        if values.ndim == 3 and values.shape[0] == 1:
            values = values[0]  # a mask with a dimension of channels
        if self.void is not None:
            values = values.masked_fill(values == self.void, IGNORE_INDEX)
        least, most = (int(part) for part in torch.aminmax(values))
        if least < 0:
            values = values.masked_fill(values == -1, IGNORE_INDEX)
            if (wrong := values[(values < 0) & (values != IGNORE_INDEX)]).numel():
                raise InputError(
                    f"dense: labels must be class numbers 0, 1, ..., or -1 or -100 for none, but {place} has "
                    f"{int(wrong[0])}"
                )
        if self.classes is not None and most >= self.classes:
            hint = "" if self.void == 255 or most != 255 else "; void: 255 leaves out positions of 255"
            raise InputError(
                f"class_names must name all classes, but there are {self.classes} names, and {place} has class {most} "
                f"(classes count from 0){hint}"
            )
        return values


def _to_numbers(label: Any, place: str) -> Tensor:
    if isinstance(label, Image.Image):
        if label.mode not in _CLASS_NUMBERS:
            raise InputError(
                f"dense: a mask must be a picture of class numbers, grey or with a palette, but {place} has a colour "
                f"picture of mode {label.mode}"
            )
        label = np.array(label)
    if isinstance(label, list | tuple):
        try:
            label = np.array(label)
        except ValueError as error:
            raise InputError(f"dense: labels of {place} must be numbers of one shape: {error}") from error
    if isinstance(label, np.ndarray) and label.dtype.kind in "biuf":
        native = label.dtype.newbyteorder("=")  # torch has neither other byte orders nor negative strides
        return torch.from_numpy(np.array(label, native, order="C"))
    if isinstance(label, Tensor) and not label.is_complex():
        return plain(label.detach().cpu())
    raise InputError(f"dense: labels must be numbers, but {place} has {type(label).__name__} {label!r:.60}")


def dense_part(dataset: Any, rules: LabelRules) -> Part:
    """A map-style dataset of samples with dense labels as a part of a source.

    Each item is read once, to find those without a label. The labels themselves do not stay in memory.

    Raises:
        InputError: If an item has no place for a label, or a wrong label.
    """
    size, name = len(dataset), type(dataset).__name__
    if isinstance(dataset, MaskFiles):
        targets = [IGNORE_INDEX if path is None else 0 for path in dataset.mask_paths]
        return Part(dataset, torch.tensor(targets, dtype=torch.long), dense=True)
    if size >= _MANY:
        rank_zero_info(f"data: reading {size} items of {name} for their labels")
    targets, contents = [], []
    with isolate_rng(include_cuda=False):
        for number in range(size):
            label = _label_of(dataset, number, rules)
            known = label is not None and bool(is_labeled(label).any())
            targets.append(0 if known else IGNORE_INDEX)
            contents.append(_hash(label))
        some = np.linspace(0, size - 1, min(size, _CHECKED)).astype(int).tolist()
        same = all(_hash(_label_of(dataset, number, rules)) == contents[number] for number in some)
    return Part(dataset, torch.tensor(targets, dtype=torch.long), True, contents if same else [""] * size)


def _label_of(dataset: Any, number: int, rules: LabelRules) -> Tensor | None:
    place = f"item {number} of {type(dataset).__name__}"
    return rules.convert(label_of(read_item(dataset, number), place, dense=True), place)


def _hash(label: Tensor | None) -> str:
    if label is None:
        return ""
    head = f"{label.dtype} {[*label.shape]}".encode()
    return hashlib.sha256(head + label.contiguous().numpy().tobytes()).hexdigest()[:16]


def read_labeled(
    parts: Sequence[Images], index: int, rules: LabelRules, *, visible: bool, as_pixels: bool
) -> tuple[Any, Tensor | None]:
    """Read the inputs of a sample, and its labels if training may see them; the index counts through all parts.

    Args:
        parts: The parts of a source.
        index: Index of the sample.
        rules: How labels are read.
        visible: Whether the labels may be seen. If not, they are not used.
        as_pixels: Whether the input is returned as pixels (C, H, W), as ``read_pixels`` does.

    Raises:
        InputError: If something cannot be read, or labels are wrong. The message names the sample.
    """
    part, number = part_of(parts, index)
    files, place = _mask_files(part, number)
    if files is not None or not visible:
        if as_pixels:
            inputs: Any = read_pixels([part], number)
        elif files is not None and not isinstance(part, DecodedImages):
            inputs = files.picture(place)
        else:
            inputs = read_image([part], number)
        mask = files.mask(place) if files is not None and visible else None
        label = None if mask is None or files is None else rules.convert(mask, files.name(place))
        if label is not None and isinstance(part, DecodedImages):  # which may be smaller than the file
            pixels = inputs if isinstance(inputs, Tensor) else part.pixels(number)
            label = label if label.shape == pixels.shape[-2:] else resize_masks(label, [*pixels.shape[-2:]])
        return inputs, label
    name = f"item {number} of {type(part).__name__}"
    item = read_item(part, number)
    inputs, label = inputs_of(item, part, number), rules.convert(label_of(item, name, dense=True), name)
    return (to_pixels(inputs, part, number) if as_pixels else inputs), label


def _mask_files(images: Any, index: int) -> tuple[MaskFiles | None, int]:
    """Return the dataset of files that an item is of, and its number there; None for any other item."""
    if isinstance(images, DecodedImages):
        return _mask_files(images.part, index)
    if isinstance(images, Subset):
        return _mask_files(images.dataset, int(images.indices[index]))
    if isinstance(images, ConcatDataset):
        return _mask_files(*part_of(images.datasets, index))  # type: ignore[arg-type]
    return (images, index) if isinstance(images, MaskFiles) else (None, index)
