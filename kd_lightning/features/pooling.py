"""Pooling: one vector for each sample out of a feature with positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.features.channels import Layout

How = Literal["mean", "first"]
"""How a feature with positions becomes one vector: their mean, or the first token."""


@dataclass(frozen=True)
class Pool:
    """Turns maps or tokens into one vector (B, C). A vector stays as it is.

    Args:
        how: ``"mean"`` over the positions, or ``"first"``, the first token (the class token of vision transformers).
        layout: Where the feature has its channels: ``"first"`` for (B, C, ...), ``"last"`` for (B, ..., C).

    Raises:
        InputError: If ``how`` is unknown, or a feature for ``"first"`` has more than one dimension of positions.

    >>> Pool("mean")(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    >>> Pool("first", "last")(torch.arange(6.0).view(1, 3, 2))
    tensor([[0., 1.]])
    """

    how: How
    layout: Layout = "first"

    def __post_init__(self) -> None:
        if self.how not in ("mean", "first"):
            raise InputError(f"pool must be mean or first, got {self.how!r}")

    def __call__(self, feature: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return vectors (B, C). Means are at least float32.

        Args:
            feature: (B, C, ...) or (B, ..., C), see ``layout``.
            mask: Which positions exist, (B, ...). Others are left out of the mean, if the feature has these positions.
                Default: None, which means that all exist.
        """
        if feature.ndim < 3:
            return feature
        rows = feature.movedim(-1, 1) if self.layout == "last" else feature
        if self.how == "first":
            if rows.ndim > 3:
                raise InputError(f"pool: first needs tokens, such as (B, N, C), got a map {[*feature.shape]}")
            return rows[:, :, 0]
        rows = rows.flatten(2).to(torch.promote_types(feature.dtype, torch.float32))
        if mask is None or mask.shape != feature.shape[:1] + _positions(feature, self.layout):
            return rows.mean(dim=2)
        exists = (mask != 0).to(rows.device).flatten(1)[:, None]
        return rows.masked_fill(~exists, 0).sum(dim=2) / exists.sum(dim=2).clamp(min=1)


def _positions(feature: Tensor, layout: Layout) -> torch.Size:
    return feature.shape[1:-1] if layout == "last" else feature.shape[2:]
