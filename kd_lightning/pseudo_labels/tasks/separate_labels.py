"""Samples with one label or several, each of which is given or not by itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, Batch, LabelKind, is_labeled
from kd_lightning.pseudo_labels.tasks.base import PseudoLabelTask, columns, no_pseudo_labels


class SeparateLabelsTask(PseudoLabelTask):
    """The base of tasks whose labels (N, K) are given one by one; a row of predictions has one number for each."""

    def given(self, batch: Batch) -> Tensor:
        """Return which labels are known and no pseudo-labels, (B, K) booleans; (B, 1) if the batch has no labels."""
        y = self.labels(batch)
        if y is None:
            return torch.zeros(len(batch), 1, dtype=torch.bool, device=batch.device)
        known = is_labeled(y)
        return known if batch.kind is None else known & (columns(batch.kind) != LabelKind.PSEUDO)

    def without_pseudo_labels(self, batch: Batch, given: Tensor) -> Batch:
        """Return a batch in which pseudo-labels are missing labels."""
        y = batch.y
        if batch.kind is None or y is None:
            return batch
        missing = float("nan") if y.is_floating_point() else IGNORE_INDEX
        return replace(batch, y=torch.where(given[:, 0] if y.ndim == 1 else given, y, missing))

    def refreshed(self, rows: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored pseudo-labels and their weights, (N, K) both."""
        y = self.labels(rows)
        if rows.kind is None or y is None:
            return no_pseudo_labels(outputs, outputs)
        accepted = columns(rows.kind) == LabelKind.PSEUDO
        weight = accepted.to(outputs)
        if rows.weight is not None:
            weight = weight * rows.weight.to(outputs).unsqueeze(1)
        return torch.where(accepted, y, 0).to(outputs), weight

    def labels(self, batch: Batch) -> Tensor | None:
        """Return the labels (B, K) of a batch; None if it does not show how many labels a sample has."""
        return None if batch.y is None else columns(batch.y)
