"""How outputs of a teacher are stored, and how far two sets of them are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_lightning.cache.codecs import Codec, DenseCodec, TopKCodec
from kd_lightning.cache.outputs import OutputRows
from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher


@dataclass(frozen=True)
class Layout:
    """How outputs are stored.

    Attributes:
        class_dim: Dimension of the outputs (B, ...) that holds classes, if each position has a row of the codec.
        ragged: Whether token sequences have lengths of their own.
    """

    class_dim: int | None
    ragged: bool


def layout_of(teacher: Teacher, rows: OutputRows, class_dim: int | None) -> Layout:
    """Decide how outputs are stored. Dense ones of one shape are stored as they are without ``cache_top_k``.

    Args:
        teacher: The teacher.
        rows: Some outputs.
        class_dim: The dimension of dense outputs that holds classes, if it is known.

    Raises:
        InputError: If ``cache_top_k`` is set, and it is not known where the classes are.
    """
    outputs = rows.outputs
    if outputs.ndim < 3 or (rows.lengths is None and teacher.cache_top_k is None):
        return Layout(None, False)
    if class_dim is None or class_dim % outputs.ndim == 0:
        raise InputError(
            f"cache_top_k needs logits (B, C), or the class_dim of the module, got outputs {['B', *outputs.shape[1:]]}"
        )
    return Layout(class_dim % outputs.ndim, rows.lengths is not None)


def codec_of(teacher: Teacher, shape: torch.Size, dtype: str, layout: Layout) -> Codec:
    """Return the codec of outputs (B, ...) of a shape, or of each of their positions."""
    count = shape[1:].numel() if layout.class_dim is None else shape[layout.class_dim]
    if teacher.cache_top_k is None:
        return DenseCodec(count, dtype)
    kept = None
    if teacher.classes is not None and None in teacher.classes:
        kept = [output for output, number in enumerate(teacher.classes) if number is not None]
    return TopKCodec(count, dtype, teacher.cache_top_k, kept)


class Distance:
    """The distance of two sets of outputs, one part after the other.

    Attributes:
        count: Number of outputs.
        changed: Number of outputs that differ.
        farthest: Largest difference; NaN if an output is NaN, or infinite, in one of them alone.
        largest: Largest absolute value of the finite outputs of the second.
    """

    def __init__(self) -> None:
        self.count = self.changed = 0
        self.farthest = self.largest = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Add a part."""
        same = (one == other) | (one.isnan() & other.isnan())
        self.count += same.numel()
        self.changed += int((~same).sum())
        if other.numel():
            distance = float((one.float() - other.float()).abs().masked_fill(same, 0).max())
            self.farthest = distance if math.isnan(distance) else max(distance, self.farthest)
            self.largest = max(self.largest, float(other.abs().where(other.isfinite(), 0).max()))

    def within(self, share: float) -> bool:
        """Whether the largest difference is at most this share of the largest value."""
        return self.farthest <= share * self.largest
