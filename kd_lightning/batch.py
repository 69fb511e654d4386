"""The batch that all modules and losses read."""

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
    """The kind of a row's label."""

    CLEAN = 0  # y is the label
    MISSING = 1  # there is no label
    PSEUDO = 2  # y is a pseudo-label
    COARSE = 3  # y is missing; candidates holds the possible classes
    NOISY = 4  # y may be wrong


class Rows(NamedTuple):
    """The positions of a batch's rows in the table of all views, by which teachers cache their outputs.

    Attributes:
        table: The table of views; a :class:`~kd_lightning.data.views.ViewTable`.
        numbers: (B,) integers. They stay on the CPU whatever the batch's device is, so that no lookup synchronises.
    """

    table: Hashable
    numbers: np.ndarray[Any, Any]


@dataclass
class Batch:
    """A batch of B rows. All fields except ``x`` are optional.

    Attributes:
        x: Inputs, (B, ...).
        y: Labels: (B,) class indices, or (B, L) zeros and ones for the multilabel task. A missing label is ``-100``
            (``NaN`` where labels are floats).
        index: The sample of each row, (B,) integers. Labels and teacher outputs are looked up by it.
        view: The view (augmentation of the sample) of each row, (B,) integers.
        kind: The kind of each row's label, (B,) numbers of ``LabelKind``. If None, known labels are clean.
        weight: The factor of each row's hard loss, (B,). If None, it is 1.
        candidates: The classes that a coarse label allows, (B, C) booleans; all False in rows without coarse label.
        soft: Probabilities (B, C) that replace ``y`` in rows of pseudo-labels; 0 in other rows.
        x_strong: A second, stronger augmentation of the same samples, (B, ...).
        mean_labels: Mean number of known labels, coarse and pseudo-labels included, over the batches of this optimiser
            step (all processes, all accumulated batches). The hard term is divided by it, so that one process and two
            give the same gradient. The data loader sets it; if it does not, the module does.
        mean_pseudo: Mean number of pseudo-labels among ``mean_labels``.
        mean_coarse: Mean number of coarse labels among ``mean_labels``.
        mean_rows: Mean number of rows of these batches. If None, it is B.
        labeled: Numbers (K,) of the rows whose label is known. The loader sets it, so that no step synchronises with
            the device. If None, ``y`` is searched.
        rows: The positions of the rows in the table of all views, by which teachers cache their outputs.
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
        """Convert ``(x, y)``, ``(x,)`` or ``x`` to a ``Batch``; a ``Batch`` is returned unchanged.

        Raises:
            InputError: If ``batch`` is anything else.
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
        """Return a batch of some rows, given by a boolean tensor (B,) or by their numbers."""
        count = len(self)
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} | {"labeled": None}
        for name, part in parts.items():
            if isinstance(part, Tensor) and part.ndim and len(part) == count:
                parts[name] = part[rows]
        if self.rows is not None:
            parts["rows"] = Rows(self.rows.table, self.rows.numbers[rows.cpu().numpy()])
        return Batch(**parts)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with all tensors on a device, copied without blocking where possible. Lightning calls it."""
        device = torch.device(device)
        blocking = device.type in ("cpu", "mps")  # as in Lightning: there a tensor could be read before its copy ends
        return self._map(lambda tensor: tensor.to(device, non_blocking=not blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with all tensors in pinned memory. DataLoader calls it if ``pin_memory=True``."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def is_labeled(y: Tensor) -> Tensor:
    """Return a boolean tensor of the shape of ``y``: True where the label is known."""
    return ~torch.isnan(y) if y.is_floating_point() else y != IGNORE_INDEX
