"""The labels of a multilabel sample in a label row and in a file: 0, 1, or nothing for each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.tables import PATH_COLUMNS
from kd_lightning.errors import InputError
from kd_lightning.runs.spreadsheet import unescape_cell

Several = list[int | None]
"""The labels of a sample by class: 0, 1, or None where one is missing."""
_RESERVED = (*PATH_COLUMNS, "index", "content", "label", "kind", "weight", "score")


def has_several_labels(targets: Tensor) -> bool:
    """Whether targets are (N, L) zeros and ones, some of which may be missing."""
    if targets.ndim != 2:
        return False
    known = targets[is_labeled(targets)]
    return bool(((known == 0) | (known == 1)).all())


def label_columns(names: Sequence[str]) -> list[str]:
    """Return the columns of a multilabel file, one for each class; InputError if a name is that of another column."""
    columns = [normal_name(name) for name in names]
    for name in columns:
        if name in _RESERVED or columns.count(name) > 1:
            what = "is a column of label files" if name in _RESERVED else "comes twice"
            raise InputError(f"class {name!r} {what}, so that files of several labels cannot name it; rename the class")
    return columns


def from_tensor(labels: Tensor) -> Several:
    """Convert the labels of a sample, (L,), to numbers; missing ones become None."""
    known = is_labeled(labels).tolist()
    return [int(value) if is_known else None for value, is_known in zip(labels.tolist(), known, strict=True)]


def to_tensor(labels: Several) -> Tensor:
    """Convert the labels of a sample to a float32 tensor (L,); missing ones become NaN."""
    return torch.tensor([math.nan if value is None else float(value) for value in labels])


def read_cells(row: Mapping[str, str], columns: Sequence[str]) -> Several:
    """Read the labels of a row of a file. An empty cell is a missing label.

    Args:
        row: The cells by column.
        columns: The columns of the classes.

    Raises:
        InputError: If a cell is neither 0, 1 nor empty. The message names the column.

    >>> read_cells({"cat": "1", "dog": "0.0"}, ["cat", "dog", "eel"])
    [1, 0, None]
    """
    values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": None}  # as spreadsheets write them
    for name in columns:
        if row.get(name, "").lower() not in values:
            raise InputError(f"{name} must be 0, 1 or empty, got {row[name]!r:.40}")
    return [values[row.get(name, "").lower()] for name in columns]


def rename_columns(columns: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return {column of a file: column of a class} for those that name a class."""
    plain = {column: normal_name(unescape_cell(column)) for column in columns}
    return {column: name for column, name in plain.items() if name in classes}


def check_several(label: Any, kind: str, weight: Any, classes: int, place: str) -> None:
    """Raise InputError unless a label row is one of a multilabel sample.

    Args:
        label: The row's labels; they do not count for kind missing.
        kind: The row's kind.
        weight: The row's weight.
        classes: Number of classes.
        place: What names the row, for messages.
    """
    if kind not in ("clean", "missing"):
        raise InputError(f"{place}: a sample of several labels has kind clean or missing, got {kind!r:.80}")
    if weight != 1:
        raise InputError(f"{place}: a sample of several labels has weight 1, got {weight!r:.80}")
    if kind == "clean":
        fits = isinstance(label, list) and len(label) == classes
        if not fits or any(value is not None and (type(value) is not int or value not in (0, 1)) for value in label):
            raise InputError(f"{place} must have {classes} labels 0, 1 or null, got {label!r:.80}")
