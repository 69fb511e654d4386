"""The labels of a part in one form: int64 class indices, or zeros and ones; -100 or NaN where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.errors import InputError

_MOST_CLASSES = 10_000_000
"""Larger numbers are none of classes, but names of samples, or dates."""

Labels = Tensor | np.ndarray[Any, Any] | list[Any]
"""Labels as a dataset holds them, one for each item."""


def has_label(targets: Tensor) -> Tensor:
    """Return booleans (N,): whether a sample has a label, or at least one of several."""
    known = is_labeled(targets)
    return known if known.ndim == 1 else known.flatten(1).any(dim=1)


def has_one_class(targets: Tensor) -> bool:
    """Whether each sample has one class: (N,) integers."""
    return targets.ndim == 1 and not targets.is_floating_point()


def count_classes(targets: Tensor, class_names: Sequence[str] | None) -> int:
    """Return the number of classes: that of the names, else the highest class + 1; 0 if no sample has a label."""
    if class_names:
        return len(class_names)
    return max(int(targets.max()) + 1, 0) if len(targets) else 0


def is_missing(label: Any) -> bool:
    """Whether a label of a dataset is None, NaN, or the NA of pandas."""
    return label is None or type(label).__name__ == "NAType" or (isinstance(label, float) and label != label)


def texts_among(labels: Labels) -> bool:
    """Whether labels are texts, with None, NaN or an empty text where one is missing."""
    if isinstance(labels, Tensor):
        return False
    if isinstance(labels, np.ndarray):
        return labels.dtype.kind == "U" or (labels.dtype == object and texts_among(labels.tolist()))
    return any(issubclass(kind, str) for kind in {*map(type, labels)})


def to_tensor(labels: Labels, place: str) -> Tensor:
    """Convert numbers, rows of numbers and None to a tensor (N,) or (N, L). Missing ones are -100, or NaN in floats.

    Args:
        labels: One for each item: a number, an array or list of numbers, or None.
        place: Name of the dataset, for messages.

    Raises:
        InputError: For other labels, and for rows of different lengths. The message names the item.
    """
    if isinstance(labels, np.ndarray) and labels.dtype != object:
        numbers = labels.dtype.kind in "biuf"
        native = labels.dtype.newbyteorder("=")  # torch has neither other byte orders nor negative strides
        labels = torch.from_numpy(np.array(labels, native, order="C")) if numbers else labels.tolist()
    if isinstance(labels, Tensor):
        return labels.detach().cpu()
    labels = [*labels]
    kinds = {*map(type, labels)}
    if kinds <= {int, bool} or kinds == {float}:
        return _tensor(labels, place)
    scalars = [_scalar(label, number, place) for number, label in enumerate(labels)]
    if any(isinstance(label, Tensor) for label in scalars):
        return _stack(scalars, place)
    known = [label for label in scalars if label is not None]
    whole = all(isinstance(label, Integral) for label in known)
    missing = IGNORE_INDEX if whole else float("nan")
    if len(known) == len(scalars) and all(isinstance(label, Tensor) for label in labels):
        return torch.stack([label.detach().cpu() for label in labels])  # of their own type
    return _tensor([missing if label is None else label for label in scalars], place)


def normalize(targets: Tensor, place: str) -> Tensor:
    """Bring labels to one form: (N,) int64 class indices, (N, L) zeros and ones, or floats.

    Integers and booleans become int64, and (N, 1) or (N, 1, 1) integers (N,). Half precision becomes float32. A class
    -1 becomes -100. Among zeros and ones, -1 and -100 become NaN, also where they are floats; other floats stay as they
    are.

    Args:
        targets: Labels.
        place: Name of the part, for messages.

    Raises:
        InputError: For negative and huge classes, for several integers a sample that are no zeros and ones, and for -1
            and 1 without any 0, where -1 may mean a missing label or a class. The message names an item.
    """
    if targets.is_complex() or targets.ndim == 0 or 0 in targets.shape[1:]:
        raise InputError(f"{place}: labels must be (N,) or (N, L) numbers, got {targets.dtype} {[*targets.shape]}")
    floats = targets.is_floating_point()
    if floats:
        targets = targets.float() if targets.element_size() < 4 else targets  # numpy has no bfloat16
    else:
        targets = targets.long()
        targets = targets.flatten() if targets.shape[1:].numel() == 1 else targets
    if not targets.numel() or targets.ndim > 2:
        return targets
    several = targets.ndim == 2
    missing = targets.isnan() if floats else targets == IGNORE_INDEX
    minus = targets == -1
    if floats or several:
        known = ~(missing | minus | (targets == IGNORE_INDEX))
        wrong = known & ((targets < 0) | (targets > 1))
        if wrong.any() and floats:
            return targets  # no zeros and ones
        allowed = "0, 1, or -1 for a missing one, where a sample has several"
    else:
        wrong = ((targets < 0) & ~missing & ~minus) | (targets >= _MOST_CLASSES)
        allowed = "class numbers 0, 1, ..., or -1 for a sample without one"
    if wrong.any():
        item = int(wrong.flatten(1).any(dim=1).nonzero()[0]) if several else int(wrong.nonzero()[0])
        value = targets[item][wrong[item]].tolist() if several else int(targets[item])
        raise InputError(f"{place}: labels must be {allowed}, but item {item} has {value}")
    if minus.any():
        if (targets == 1).any() and not ((targets >= 0) & (targets != 1)).any():
            raise InputError(
                f"{place}: labels are -1 and 1 alone (item {int(minus.nonzero()[0, 0])} has -1), but -1 means a "
                "missing one; write 0 and 1 for two classes, or -100 (NaN in floats) for missing ones"
            )
        what = "labels are" if several else "samples have the label"
        rank_zero_info(f"data: {place}: {int(minus.sum())} {what} -1, which means missing")
    if several and (minus | missing).any() and not floats:
        targets, floats = targets.float(), True
    gone = minus | (targets == IGNORE_INDEX)
    return torch.where(gone, float("nan") if floats else IGNORE_INDEX, targets) if gone.any() else targets


def _scalar(label: Any, number: int, place: str) -> Any:
    """A label as an int or float, a tensor with at least one dimension, or None if it is missing."""
    if isinstance(label, list | tuple):
        label = _row(label, number, place)
    if isinstance(label, np.ndarray | np.generic) and label.dtype.kind in "biuf":
        label = torch.from_numpy(np.array(label, order="C")) if label.ndim else label.item()
    if isinstance(label, Tensor):
        if label.ndim:
            return label.detach().cpu()
        label = label.item()
    if is_missing(label):
        return None
    if not isinstance(label, Real):
        raise InputError(
            f"{place}: a label must be a number, a text, None, or a row of numbers, but item {number} has "
            f"{type(label).__name__} {label!r:.60}"
        )
    return int(label) if isinstance(label, Integral) else float(label)


def _row(label: Sequence[Any], number: int, place: str) -> Tensor:
    try:
        values: Any = [float("nan") if is_missing(value) else value for value in label]
        return torch.stack(values) if values and isinstance(values[0], Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{place}: a row of labels must hold numbers, but item {number} has {label!r:.60}") from error


def _tensor(values: list[Any], place: str) -> Tensor:
    try:
        return torch.tensor(values, dtype=None if values else torch.long)
    except (RuntimeError, ValueError, OverflowError) as error:  # a number that no int64 can hold
        raise InputError(f"{place}: labels must be numbers of at most 64 bits: {error}") from error


def _stack(rows: list[Any], place: str) -> Tensor:
    """Stack rows; those that are None become NaN."""
    first = next(row for row in rows if isinstance(row, Tensor))
    for number, row in enumerate(rows):
        if row is not None and (not isinstance(row, Tensor) or row.shape != first.shape):
            shape = [*row.shape] if isinstance(row, Tensor) else "a number"
            raise InputError(f"{place}: labels must have one shape, {[*first.shape]}, but item {number} has {shape}")
    if any(row is None for row in rows):
        if first.numel() == 1 and not any(row is not None and row.is_floating_point() for row in rows):
            nothing = torch.full_like(first, IGNORE_INDEX, dtype=torch.long)  # a class index
        else:
            nothing = torch.full_like(first, float("nan"), dtype=torch.float32)
        rows = [nothing if row is None else row for row in rows]
    kinds = {row.dtype for row in rows}
    if len(kinds) > 1:
        kind = torch.float32 if any(kind.is_floating_point for kind in kinds) else torch.long
        rows = [row.to(kind) for row in rows]
    return torch.stack(rows)
