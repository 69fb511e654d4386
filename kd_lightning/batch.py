"""The one batch that every module reads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd_lightning.errors import InputError

IGNORE_INDEX = -100
"""A label that training may not see (``NaN`` where targets are floats)."""


class LabelKind(IntEnum):
    """What a row's label is."""

    CLEAN = 0
    MISSING = 1
    PSEUDO = 2
    COARSE = 3  # y is missing, and candidates tells what it may be
    NOISY = 4  # y may be wrong


class Rows(NamedTuple):
    """Where the rows of a batch stand in a table of all views, in which what teachers say of them is kept.

    Attributes:
        table: Which one; a :class:`~kd_lightning.data.views.Views`.
        numbers: (B,) integers on the CPU, whatever the batch's device, so that looking up never waits for one.
    """

    table: Hashable
    numbers: np.ndarray[Any, Any]


@dataclass
class Batch:
    """A batch of samples; all fields but ``x`` are optional.

    Attributes:
        x: Inputs, (B, ...).
        y: Labels: (B,) class indices, (B, L) zeros and ones for the multilabel task. ``-100`` (``NaN`` where
            floats) is a missing label.
        index: Which sample each row is, (B,) integers. Labels and teacher outputs are looked up by it.
        view: Which augmentation of its sample each row is, (B,) integers.
        kind: What each row's label is, (B,) numbers of ``LabelKind``. None: clean where it is known.
        weight: What each row's hard loss is multiplied by, (B,). None: 1.
        candidates: Which classes a coarse label allows, (B, C) booleans; none in rows without one, whose y counts.
        soft: Probabilities to learn instead of ``y``, (B, C), in rows of pseudo-labels; elsewhere 0.
        x_strong: A second, stronger augmentation of the same samples, (B, ...).
        mean_labels: Known labels, coarse and pseudo-labels included, that a batch of this optimiser step holds on
            average over the processes and the accumulated batches. Set by the data loader, or by the module where a
            loader does not know it; divides the hard term, so that one process and two give the same gradient.
        mean_pseudo: How many of these are pseudo-labels.
        mean_coarse: How many of these are coarse labels.
        mean_rows: How many rows such a batch has on average. None: as many as this one.
        labeled: Numbers (K,) of the rows whose label is known, found by the loader so that no step waits for a device.
            None: looked for in ``y``.
        rows: Where these rows stand among all views, where a teacher keeps its outputs of them.
    """

    x: Tensor
    y: Tensor | None = None
    index: Tensor | None = None
    view: Tensor | None = None
    kind: Tensor | None = None
    weight: Tensor | None = None
    candidates: Tensor | None = None
    soft: Tensor | None = None
    x_strong: Tensor | None = None
    mean_labels: float | Tensor | None = None
    mean_pseudo: float = 0.0
    mean_coarse: float = 0.0
    mean_rows: float | None = None
    labeled: Tensor | None = None
    rows: Rows | None = None

    @classmethod
    def from_any(cls, batch: Any) -> Batch:
        """Take a ``Batch`` as it is; make one of ``(x, y)``, ``(x,)`` or ``x``, as any DataLoader gives them.

        Raises:
            InputError: For anything else.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Tensor):
            return cls(batch)
        if isinstance(batch, Sequence) and len(batch) in (1, 2) and all(isinstance(part, Tensor) for part in batch):
            return cls(*batch)
        got = [type(part).__name__ for part in batch] if isinstance(batch, Sequence) else type(batch).__name__
        raise InputError(f"a batch must be a Batch, a tensor x, or a pair of tensors (x, y), got {got}")

    def __len__(self) -> int:
        return len(self.x)

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows, given by a boolean tensor (B,) or by their numbers."""
        count = len(self)
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} | {"labeled": None}
        for name, part in parts.items():
            if isinstance(part, Tensor) and part.ndim and len(part) == count:
                parts[name] = part[rows]
        if self.rows is not None:
            parts["rows"] = Rows(self.rows.table, self.rows.numbers[rows.cpu().numpy()])
        return Batch(**parts)

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on a device, without waiting for it; Lightning calls it, and would take longer by itself."""
        device = torch.device(device)
        wait = device.type in ("cpu", "mps")  # as Lightning does: these could be read before all of it is there
        return self._with(lambda tensor: tensor.to(device, non_blocking=not wait))

    def pin_memory(self) -> Batch:
        """Pin every tensor; DataLoader calls it where ``pin_memory=True``."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def is_labeled(y: Tensor) -> Tensor:
    """Where a label is known: a boolean tensor of the shape of ``y``."""
    return ~torch.isnan(y) if y.is_floating_point() else y != IGNORE_INDEX
