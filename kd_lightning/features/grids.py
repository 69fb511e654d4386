"""Sizes of maps whose networks get inputs of other sizes than those that a projector was built from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def matching_sides(sides: Sequence[int], student: Sequence[int], teacher: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of the teacher's map that belongs to a student's map.

    Args:
        sides: Sides of the student's map.
        student: Sides of the student's map that a projector was built from.
        teacher: Sides of the teacher's map of the same sample.

    >>> matching_sides([14, 14], [7, 7], [16, 16])
    (32, 32)
    """
    return tuple(max(1, round(side * t / s)) for side, s, t in zip(sides, student, teacher, strict=True))


def resize_linearly(maps: Tensor, sides: Sequence[int]) -> Tensor:
    """Return maps (B, C, ...) of other sides, interpolated linearly along each one."""
    if maps.shape[2:] == tuple(sides):
        return maps
    return F.interpolate(maps, tuple(sides), mode=_MODES[len(sides)])
