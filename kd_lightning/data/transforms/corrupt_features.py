"""Corrupted rows of a table: some features have the value of another row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.sources.images import read_image
from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError


class CorruptFeatures(BatchTransform):
    """Replace random features of each row by values that they have in other rows: a strong view of a table.

    Each feature is replaced with probability ``p``. Its new value is that of a random row of ``rows``, drawn for each
    feature by itself, so from the feature's marginal distribution. Such values are in the range of the feature, and
    numbers of categories stay numbers of categories. Columns of one-hot codes do not: give a category as one number.

    With ``rows`` of zeros, features are masked.

    Source: Yoon et al., "VIME: Extending the Success of Self- and Semi-supervised Learning to Tabular Domain" (NeurIPS
    2020); Bahri et al., "SCARF: Self-Supervised Contrastive Learning using Random Feature Corruption" (ICLR 2022),
    https://arxiv.org/abs/2106.15147, which corrupts a fixed number of features.

    Args:
        rows: A map-style dataset of rows, such as the one of ``DatasetSource.train``; labels are not used. In Python
            also a tensor or array (N, D). It stays in memory.
        p: Probability of each feature, 0 to 1.

    Raises:
        InputError: If ``p`` is out of range, or ``rows`` are no rows of one shape. In a call: if rows have another
            shape or type than ``rows``.
    """

    moves_pixels = False

    def __init__(
        self,
        rows: Dataset,  # type: ignore[type-arg]  # jsonargparse refuses init_args of Dataset[Any]
        p: float = 0.3,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"p must be 0 to 1, got {p}")
        self.p = float(p)
        self.register_buffer("rows", _table(rows), persistent=False)

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return new rows (B, D) of the same type."""
        rows: Tensor = self.rows  # type: ignore[assignment]
        shape = images.shape[1:]
        if rows.shape[1:] != shape or rows.is_floating_point() != images.is_floating_point():
            own, got = (f"{[*one.shape[1:]]} {one.dtype}" for one in (rows, images))
            raise InputError(f"CorruptFeatures: rows must be {own}, as those that it has, got {got}")
        flat, draws_of_rows = rows.reshape(len(rows), -1), draws.on_cpu()
        chosen = draws_of_rows.uniform(shape=shape) < self.p
        places = draws_of_rows.integers(0, len(rows) - 1, shape=shape)
        values = flat[places.reshape(len(images), -1), torch.arange(flat.shape[1])].view(images.shape)
        return torch.where(chosen.to(images.device), values.to(images), images)


def _table(rows: Any) -> Tensor:
    """Return rows as a tensor (N, ...)."""
    if isinstance(rows, np.ndarray | Tensor):
        table = torch.as_tensor(rows)
    else:
        found = [read_image([rows], number) for number in range(len(rows))]
        kinds = {
            (tuple(one.shape), str(one.dtype)) if isinstance(one, np.ndarray | Tensor) else type(one) for one in found
        }
        if len(kinds) > 1 or not isinstance(found[:1][0] if found else None, np.ndarray | Tensor):
            got = ", ".join(sorted(map(str, kinds))[:3]) or "none"
            raise InputError(f"rows must be a dataset of tensors or arrays of one shape and type, got {got}")
        table = torch.stack([torch.as_tensor(one) for one in found])
    if table.ndim < 2 or not table.numel():
        raise InputError(f"rows must be at least one row, (N, D), got {[*table.shape]}")
    return table
