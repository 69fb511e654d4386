"""Bring features into one form: channels first, and tokens as a map where the other feature is a map."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.features.channels import Layout

_BEFORE = (0, 1, 2, 5)
"""Numbers of tokens before the grid."""
_LEAST_SIDE = 4


def usual_layout(shape: Sequence[int]) -> Layout:
    """Return the layout that a sample's shape has in most networks: tokens (N, C), and maps (C, H, W)."""
    return "last" if len(shape) == 2 else "first"


def is_tokens(feature: Tensor, layout: Layout) -> bool:
    """Whether a feature is tokens (B, N, C)."""
    return feature.ndim == 3 and layout == "last"


def channels_first(feature: Tensor, layout: Layout) -> Tensor:
    """Return a feature as (B, C) or (B, C, ...)."""
    return feature.movedim(-1, 1) if layout == "last" and feature.ndim > 2 else feature


def arrange_pair(student: Tensor, teacher: Tensor, layouts: tuple[Layout, Layout]) -> tuple[Tensor, Tensor]:
    """Return both features with the channels first: (B, C), (B, C, N) for tokens, (B, C, H, W) for maps.

    Tokens become a square map, see :func:`to_map`, where the other feature is a map (B, C, H, W), or where both are
    tokens of different number.

    Args:
        student: Output of the student's layer.
        teacher: Output of the teacher's layer.
        layouts: Where they have their channels.

    Raises:
        InputError: If the grid of tokens that are compared with a map is not square.
    """
    are_tokens = [is_tokens(feature, layout) for feature, layout in zip((student, teacher), layouts, strict=True)]
    first, second = (channels_first(f, layout) for f, layout in zip((student, teacher), layouts, strict=True))
    if all(are_tokens):
        sides = [grid_side(feature.shape[1]) for feature in (student, teacher)]
        if student.shape[1] != teacher.shape[1] and all(sides):
            return to_map(student), to_map(teacher)
        return first, second
    if are_tokens[0] and second.ndim == 4:
        return to_map(student), second
    if are_tokens[1] and first.ndim == 4:
        return first, to_map(teacher)
    return first, second


def grid_side(tokens: int) -> int:
    """Return the side of the square grid of tokens; 0 if it is not square.

    None, 1, 2 or 5 tokens come before it: a class token, with a distillation token (DeiT), or with four registers
    (DINOv3, and DINOv2 with registers). The last two are for grids of at least 4 x 4: a sequence of a few tokens may
    have any number.

    >>> [grid_side(196 + others) for others in (0, 1, 2, 5)]
    [14, 14, 14, 14]
    """
    for others in _BEFORE:
        grid = tokens - others
        side = math.isqrt(max(grid, 0))
        if side * side == grid and side >= (1 if others < 2 else _LEAST_SIDE):
            return side
    return 0


def to_map(tokens: Tensor) -> Tensor:
    """Arrange tokens (B, N, C) as a map (B, C, g, g). Those before the grid, see :func:`grid_side`, are left out.

    Raises:
        InputError: If the grid is not square.
    """
    side = grid_side(tokens.shape[1])
    if not side:
        raise InputError(f"the grid of {tokens.shape[1]} tokens is not square, with or without a class token")
    return tokens[:, -side * side :].transpose(1, 2).reshape(len(tokens), tokens.shape[2], side, side)
