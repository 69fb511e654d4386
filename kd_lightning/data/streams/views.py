"""Make batches of a stream's items: inputs by the transforms of views, and labels."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, Batch, is_labeled
from kd_lightning.data.sources.class_names import number_names
from kd_lightning.data.sources.items import STRONG_INPUTS, TEACHER_INPUTS, Entries, label_of
from kd_lightning.data.sources.targets import is_missing, texts_among, to_tensor
from kd_lightning.data.views.dataset import ViewDataset, collate
from kd_lightning.data.views.nested import is_number
from kd_lightning.errors import InputError


class Items:
    """Some items of a stream, by their number in it. It has no end, since the length of a stream is not known."""

    def __init__(self) -> None:
        self.items: dict[int, Any] = {}

    def __getitem__(self, number: int, /) -> Any:
        return self.items[number]

    def __len__(self) -> int:
        return sys.maxsize


class StreamViews:
    """Make batches of items.

    Args:
        part: Name of the part, for messages.
        transforms: The transform, and that of the strong view; None for none.
        seed: Seed of the augmentation.
        device: Device of whole-batch transforms; None for where items are read.
        class_names: Names of the classes; None if labels are numbers.
        columns: Names of the inputs and of the label in items that are mappings; None for the usual names.
        labeled: Whether items have labels. If not, an item is the inputs, or has them where labeled ones have.
        pad_token: Number that pads ``input_ids``.
        task: Task of the module; None if it is not known. Whole numbers are values for the regression task, else
            numbers of classes, or zeros and ones.
    """

    def __init__(
        self,
        part: str,
        transforms: tuple[Any, Any],
        seed: int,
        device: torch.device | None,
        class_names: Sequence[str] | None,
        columns: tuple[str | None, str | None],
        labeled: bool = True,
        pad_token: int = 0,
        task: str | None = None,
    ) -> None:
        self.part = part
        self.task = task
        self.class_names = class_names
        self.columns = columns
        self.labeled = labeled
        self._window = Items()
        none = torch.empty(0, dtype=torch.long)
        options = (seed, transforms[1], device, pad_token)
        self._dataset = ViewDataset([self._window], none, transforms[0], *options, reads_strong=part == "train")

    def make(self, items: Sequence[Any], numbers: Tensor, epoch: int) -> Batch:
        """Return the batch of some items. Transforms that run on another device run in :meth:`finish`.

        Args:
            items: B items.
            numbers: (B,) numbers in the stream, which augmentation depends on.
            epoch: The pass, which augmentation depends on, too.

        Raises:
            InputError: If an item is none, or labels do not fit. The message names its number.
        """
        where = [f"{self.part}: sample {number} of the stream" for number in numbers.tolist()]
        items = [self._named(item, place) for item, place in zip(items, where, strict=True)]
        y = self._labels(items, where) if self.labeled else torch.full((len(items),), IGNORE_INDEX)
        self._window.items = dict(zip(numbers.tolist(), items, strict=True))
        self._dataset.indices = numbers
        rows = np.arange(len(numbers))
        batch = self._dataset.__getitems__(np.stack([rows, np.full_like(rows, epoch)], axis=1))
        self._window.items = {}
        batch.y = y
        known = is_labeled(y).reshape(len(y), -1)
        if y.ndim == 1 or known.all():
            batch.labeled = known.all(dim=1).nonzero().flatten()
        return collate(batch)

    def finish(self, batch: Batch) -> Batch:
        """Runs in the main process: run whole-batch transforms on the device, if there is one."""
        return self._dataset.finish(batch)

    def _named(self, item: Any, place: str) -> Any:
        """Return (inputs, label) of an item whose columns are named, and any other as it is. Columns are decoded."""
        if isinstance(item, Mapping):
            item = {name: _decoded(value, f"{place}: {name}") for name, value in item.items()}
        inputs, label = self.columns
        if inputs is None and label is None:
            return item
        if not isinstance(item, Mapping):
            raise InputError(f"{place} must be a mapping, since input or label is set, got {type(item).__name__}")
        for column in (inputs, label if self.labeled else None):
            if column is not None and column not in item:
                raise InputError(f"{place} must have {column!r}, got {', '.join(map(str, item))}")
        rest = {name: value for name, value in item.items() if name != label}
        if inputs is None:
            return (rest, item[label]) if self.labeled else rest
        own = label if label is not None or not self.labeled else None
        found = item[inputs]
        if more := {name: item[name] for name in (TEACHER_INPUTS, STRONG_INPUTS) if name in item}:
            found = Entries({inputs: found, **more})
        return (found, item[own] if own is not None else label_of(rest, place)) if self.labeled else found

    def _labels(self, items: Sequence[Any], where: Sequence[str]) -> Tensor:
        """Return labels as (B,) class numbers, or floats; -100 or NaN where missing."""
        values = [label_of(item, place) for item, place in zip(items, where, strict=True)]
        if texts_among(values):
            if self.class_names is None:
                raise InputError(f"{self.part}: labels are texts, such as {values[0]!r:.40}; they need class_names")
            values = number_names(values, self.class_names, f"{where[0]} and those behind it")[0]
        y = to_tensor(values, f"{where[0]} and those behind it")
        if y.ndim > 2 or y.is_complex():
            raise InputError(f"{where[0]} must have one label, or one row of them, got {[*y.shape[1:]]} {y.dtype}")
        if y.is_floating_point():
            return y.float()
        if self.task == "regression":
            return self._whole_values(y, values, where)
        y = y.long()
        if y.ndim == 2 and y.shape[1] > 1:  # zeros and ones
            missing = (y == -1) | (y == IGNORE_INDEX)
            wrong = ~missing & (y != 0) & (y != 1)
            values_of = "0, 1, or -1 for a missing one, where a sample has several"
            y = y.float().masked_fill(missing, torch.nan)
        else:
            y = y.flatten()
            y = torch.where(y == -1, IGNORE_INDEX, y)
            most = sys.maxsize if self.class_names is None else len(self.class_names)
            wrong = ((y < 0) & (y != IGNORE_INDEX)) | (y >= most)
            ends = "..." if self.class_names is None else f"... {most - 1}"
            values_of = f"class numbers 0, 1, {ends}, or -1 for a sample without one"
        if wrong.any():
            row = int(wrong.reshape(len(wrong), -1).any(dim=1).nonzero()[0])
            raise InputError(f"{where[row]}: labels must be {values_of}, got {values[row]!r:.60}")
        return y

    def _whole_values(self, y: Tensor, values: Sequence[Any], where: Sequence[str]) -> Tensor:
        """Return whole numbers as floats; NaN for None."""
        missing = torch.tensor([*map(is_missing, values)])
        odd = ((y == -1) | (y == IGNORE_INDEX)).reshape(len(y), -1).any(dim=1) & ~missing
        if odd.any():
            row = int(odd.nonzero()[0])
            raise InputError(
                f"{where[row]}: the whole numbers -1 and {IGNORE_INDEX} may be values or missing labels; for the "
                f"regression task give floats, and NaN for a missing one, got {values[row]!r:.60}"
            )
        y = y.float()
        y[missing] = torch.nan
        return y


def _decoded(value: Any, place: str) -> Any:
    """Return what Hugging Face's columns hold: a list of numbers as a tensor, ``{bytes, path}`` as a picture.

    Any other value is returned as it is.
    """
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        try:
            picture = Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"]))
            return ImageOps.exif_transpose(picture)
        except Exception as error:  # decoders raise errors of any class
            raise InputError(f"{place} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(value, list) or not value or not is_number(value):
        return value
    try:
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{place} must be numbers of one shape: {error}") from error
