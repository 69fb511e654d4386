"""Errors of networks in one line."""

from __future__ import annotations

import re

from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, describe

# torch's messages about inputs that do not fit a layer
_SHAPES = re.compile(
    r"shapes? |channels|expected .*(input|dim|scalar type)|size of tensor|sizes? mismatch|"
    r"same dtype|input type .* same",
    re.IGNORECASE,
)


def explain_shapes(error: RuntimeError, x: Inputs) -> None:
    """Raise InputError if the error is torch's about inputs that do not fit the student.

    Args:
        error: What the student has raised.
        x: The inputs.
    """
    if _SHAPES.search(str(error)):
        reason = str(error).splitlines()[0]
        raise InputError(f"the student cannot take inputs of shape {describe(x)}: {reason}") from error


def explain_single_row(error: ValueError, rows: int) -> None:
    """Raise InputError if the error is that of BatchNorm in training on one row.

    Args:
        error: What a training step has raised.
        rows: Number of rows of the batch.
    """
    if str(error).startswith("Expected more than 1 value per channel"):
        what = "this one has one row" if rows == 1 else f"of this one's {rows} rows a network gets one alone"
        raise InputError(
            f"batch_size: BatchNorm needs training batches of at least 2 rows, and {what}; set batch_size to at least "
            "2, train on at least 2 samples per process, and set drop_last=True of a DataLoader of your own, so that "
            "no last batch of one row is left"
        ) from error
