"""What a network predicts for pictures of any files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Predicted(NamedTuple):
    """The prediction for one picture.

    Attributes:
        path: Path of the file.
        name: Name of the predicted class; of the multilabel task a tuple of names. None if there is none: for a file
            that cannot be read, for probabilities that are NaN, and for tasks without classes of a whole picture.
        probability: Its probability; of the multilabel task one for each name. None likewise.
        error: Why the file cannot be read; empty if it can.
    """

    path: str
    name: str | tuple[str, ...] | None
    probability: float | tuple[float, ...] | None
    error: str = ""


@dataclass(frozen=True)
class Predictions:
    """Predictions of N pictures, in the order in which they were given. It is iterated over as :class:`Predicted`.

    Attributes:
        task: ``multiclass``, ``multilabel``, ``binary`` or ``regression``.
        paths: Path of each file.
        names: Names of the C columns of ``values``: classes, of the binary task both; of the regression task values.
        values: (N, C), float32: probabilities, or regressed values. NaN for a file that cannot be read. Of dense
            outputs (N, 0).
        errors: Why a file cannot be read, by row.
        masks: Of dense outputs the predicted class of each pixel (H, W), None for a file that cannot be read; else
            empty.
    """

    task: str
    paths: list[str]
    names: list[str]
    values: Tensor
    errors: dict[int, str] = field(default_factory=dict)
    masks: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Predicted]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Predicted:
        return Predicted(self.paths[row], *self._predict(self.values[row].tolist()), self.errors.get(row, ""))

    def _predict(self, values: list[float]) -> tuple[Any, Any]:
        """Return the name of what is predicted, and its probability."""
        if self.task == "regression" or not values or any(value != value for value in values):
            return None, None
        if self.task == "multilabel":
            found = [(name, value) for name, value in zip(self.names, values, strict=True) if value > 0.5]
            return tuple(name for name, _ in found), tuple(value for _, value in found)
        best = max(range(len(values)), key=values.__getitem__)  # the first of equal ones, as the metrics decide
        return self.names[best], values[best]

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of several parts of one network, one after another; at least one part."""
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part))
        errors = {
            start + row: error for start, part in zip(starts, parts, strict=False) for row, error in part.errors.items()
        }
        return cls(
            parts[0].task,
            [path for part in parts for path in part.paths],
            parts[0].names,
            torch.cat([part.values for part in parts]),
            errors,
            [mask for part in parts for mask in part.masks],
        )
