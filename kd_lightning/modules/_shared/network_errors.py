"""Errors of networks in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from kd_lightning.errors import InputError

# torch's messages about inputs that do not fit a layer
_SHAPES = re.compile(r"shapes? |channels|expected .*(input|dim)|size of tensor|sizes? mismatch", re.IGNORECASE)


@contextmanager
def explain_shapes(x: Tensor) -> Iterator[None]:
    """While inside, turn torch's errors about inputs that do not fit the student into an InputError.

    Args:
        x: The inputs.
    """
    try:
        yield
    except RuntimeError as error:
        if not _SHAPES.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"the student cannot take inputs of shape {[*x.shape]}: {reason}") from error


@contextmanager
def explain_single_row(rows: int) -> Iterator[None]:
    """While inside, turn the error of BatchNorm in training on one row into an InputError.

    Args:
        rows: Number of rows of the batch.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        what = "this one has one row" if rows == 1 else f"of this one's {rows} rows a network gets one alone"
        raise InputError(
            f"batch_size: BatchNorm needs training batches of at least 2 rows, and {what}; set batch_size to at least "
            "2, train on at least 2 samples per process, and set drop_last=True of a DataLoader of your own, so that "
            "no last batch of one row is left"
        ) from error
