"""Means of the hint losses over a validation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class HintMeans:
    """Means over all batches and data loaders of a validation, and over all processes."""

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    def update(self, distances: Mapping[str, Tensor], rows: int) -> None:
        """Add a batch.

        Args:
            distances: The hint loss of each pair, by guided layer.
            rows: Number of samples; 0 if the batch holds none, so that it does not count.
        """
        values = {f"val/hint/{name}": value for name, value in distances.items()}
        for name, value in {"val/hint": torch.stack([*values.values()]).sum(), **values}.items():
            if name not in self._means:
                self._means[name] = MeanMetric().to(value.device)
            self._means[name].update(value, rows)

    def compute(self) -> dict[str, Tensor]:
        """Return ``val/hint``, the sum over the pairs, and ``val/hint/<guided>``; begin anew."""
        values = {name: mean.compute() for name, mean in self._means.items()}
        self.clear()
        return values

    def clear(self) -> None:
        """Begin anew."""
        self._means.clear()
