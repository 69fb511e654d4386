"""What callbacks read of a batch of any module: never an error, whatever the batch holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kd_lightning.batch import Batch, is_labeled, unpack
from kd_lightning.errors import InputError
from kd_lightning.inputs import rows_of


def read_batch(module: Any, batch: Any) -> Batch | None:
    """Convert a batch as the module does. Labels of another number of rows than the inputs are left out.

    Returns:
        The batch; None if it is of a kind that is not known, or its inputs have no number of rows.
    """
    try:
        found = unpack(module, batch)
        rows = len(found)
    except (InputError, TypeError):  # a TypeError: inputs without dimensions
        return None
    same = found.y is None or found.y.shape[:1] == (rows,)
    return found if same else replace(found, y=None, labeled=None)


def rows_of_batch(module: Any, batch: Any) -> int | None:
    """Return the number of rows of a batch: of its tensors, or else of its labels; None if it is not known."""
    try:
        if (known := read_batch(module, batch)) is not None:
            return len(known)
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            batch = vars(batch)
        return rows_of(batch)
    except (InputError, TypeError):
        return _rows_of_labels(module, batch)


def count_labeled(module: Any, batch: Any) -> int:
    """Return the number of labeled rows of a batch, or of all if their labels are unknown; 0 if that is unknown."""
    known = read_batch(module, batch)
    if known is None or known.y is None or not known.y.numel():
        return rows_of_batch(module, batch) or 0
    return int(is_labeled(known.y).reshape(len(known), -1).any(dim=1).sum())


def _rows_of_labels(module: Any, batch: Any) -> int | None:
    try:
        y = unpack(module, batch).y
    except InputError:
        return None
    return len(y) if y is not None and y.ndim else None
