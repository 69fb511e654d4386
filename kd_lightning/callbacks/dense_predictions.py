"""Predictions of dense outputs: maps as PNG masks, token sequences as lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task

_PALETTE, _MOST = 256, 65536  # classes of a mask with a palette, and of one with 16 bits


def predicted_positions(prediction: Tensor, task: Task, class_dim: int) -> Tensor:
    """Return what is predicted for each position, on the CPU.

    Args:
        prediction: What ``predict_step`` returned: probabilities or values, or classes as integers (B, ...).
        task: The module's task.
        class_dim: The dimension of the network's outputs that holds classes.

    Returns:
        Classes (B, ...) as integers; of the multilabel and regression task zeros and ones, or values, (B, ..., C).

    Raises:
        InputError: If there is no prediction for each position of a map or a sequence.
    """
    shape, many = [*prediction.shape], task in ("multilabel", "regression")
    floats = prediction.is_floating_point()
    if prediction.is_complex() or (task == "regression" and not floats):
        raise InputError(f"predict_step returned {prediction.dtype} {shape} for task {task}")
    has_classes = many or (floats and task != "binary")
    if not 1 <= len(shape) - 1 - has_classes <= 2 or (has_classes and not -len(shape) <= class_dim < len(shape)):
        raise InputError(f"predict_step returned {shape}, no map or sequence for each sample")
    values = prediction.detach()
    if task == "multilabel":
        values = (values > 0.5).long() if floats else values
    elif floats and task != "regression":
        values = (values > 0.5).long() if task == "binary" else values.argmax(dim=class_dim)
    values = values.movedim(class_dim, -1) if many else values
    if many and values.ndim == 4:
        what = "several labels" if task == "multilabel" else "values"
        raise InputError(f"predict_step returned {shape}: {what} of each pixel are no mask of one class")
    return values.cpu()


def positions_of(batch: Batch | None, shape: Sequence[int]) -> npt.NDArray[np.bool_] | None:
    """Return which positions of a batch exist, as booleans of this shape (B, ...); None if all do, or it is unknown."""
    mask = None if batch is None else batch.position_mask
    return None if mask is None or [*mask.shape] != [*shape] else (mask != 0).cpu().numpy()


def write_mask(path: Path, classes: Tensor, there: npt.NDArray[np.bool_] | None = None) -> None:
    """Write a map of classes (H, W) as a PNG: with a palette of 256 colours, or grey in 16 bits if a class needs them.

    Args:
        path: The file. It is replaced as a whole, since two processes may write the same.
        classes: The class of each pixel.
        there: Which pixels exist. Padding at the right and at the bottom is cut off.

    Raises:
        InputError: If a class is negative, or too large for 16 bits.
    """
    values = classes.numpy()
    if there is not None and there.any():
        height, width = (int(np.flatnonzero(there.any(axis=axis))[-1]) + 1 for axis in (1, 0))
        values = values[:height, :width]
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high >= _MOST or not values.size:
        raise InputError(f"a mask must have classes 0 ... {_MOST - 1}, got {low} ... {high} in {[*values.shape]}")
    size = values.shape[1], values.shape[0]
    if high < _PALETTE:
        image = Image.frombytes("P", size, values.astype(np.uint8).tobytes())
        image.putpalette(palette())
    else:
        image = Image.frombytes("I;16", size, values.astype("<u2").tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(part, format="PNG")
    part.replace(path)


def palette() -> list[int]:
    """Return red, green and blue of 256 classes, one after the other: the colours of PASCAL VOC's masks.

    Bits 0, 3 and 6 of a class number become the highest bits of red, bits 1, 4 and 7 those of green, bits 2 and 5 those
    of blue (the function ``VOClabelcolormap`` of the VOC development kit). Class 0 is black.

    >>> palette()[:12]
    [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    """
    return [
        sum((number >> 3 * bit + shift & 1) << 7 - bit for bit in range(3))
        for number in range(256)
        for shift in range(3)
    ]


def token_predictions(
    values: Tensor, there: npt.NDArray[np.bool_] | None, task: Task, names: Sequence[str] | None
) -> list[list[Any]]:
    """Return the predictions of the tokens of each sequence, without padding.

    Args:
        values: (B, T) classes, or (B, T, C) zeros and ones or values.
        there: (B, T) booleans: which tokens exist.
        task: The module's task.
        names: Names of the classes. Without them, classes are numbers.
    """
    found = []
    for row, sequence in enumerate(values):
        tokens = sequence if there is None else sequence[there[row]]
        listed: list[Any] = tokens.tolist()
        if task == "regression":
            listed = [[float(f"{value:.6g}") for value in token] for token in listed]
        elif task == "multilabel":
            listed = [[_name(number, names) for number, value in enumerate(token) if value] for token in listed]
        else:
            listed = [_name(number, names) for number in listed]
        found.append(listed)
    return found


def _name(number: int, names: Sequence[str] | None) -> str | int:
    return str(names[number]) if names is not None and 0 <= number < len(names) else number
