"""Pseudo-labels of the multiclass task: one class a sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.pseudo_labels.collapse import collapse_text
from kd_lightning.pseudo_labels.selection.fixed_threshold import FixedThreshold
from kd_lightning.pseudo_labels.table import PoolLabels, check_classes, make_pseudo_labels
from kd_lightning.pseudo_labels.tasks.base import PseudoLabelTask, Select, no_pseudo_labels


class MulticlassTask(PseudoLabelTask):
    """One class a sample. Predictions are probabilities, rows of which sum to 1; targets, too."""

    def __init__(self) -> None:
        super().__init__("multiclass")

    def accept_all(self) -> FixedThreshold:
        """Return a selection that accepts each pseudo-label."""
        return FixedThreshold(0.0)

    def rows(self, outputs: Tensor, network: str) -> Tensor:
        """Return a network's outputs (N, C); InputError names the network if they have another shape."""
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise InputError(
                f"{network} must give logits (B, C) of at least two classes, got {[*outputs.shape]}; dense ones need "
                "class_dim"
            )
        return outputs

    def predictions(self, outputs: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return probabilities (..., C). Those of a row with a coarse label lie in its classes."""
        return mask_candidates(outputs, candidates).softmax(dim=-1)

    def confidence(self, predictions: Tensor) -> Tensor:
        """Return the highest probability of each row, (N,)."""
        return predictions.amax(dim=-1)

    def compare(self, outputs: Tensor, target: Tensor, hard_loss: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each row, (N,), and the probabilities (N, C)."""
        log_p = outputs.log_softmax(dim=-1)
        return -(target * log_p).sum(dim=-1), log_p.exp()

    def given(self, batch: Batch) -> Tensor:
        """Return which rows have a label of one class that is no pseudo-label, (B, 1) booleans."""
        if batch.y is None:
            return torch.zeros(len(batch), 1, dtype=torch.bool, device=batch.device)
        soft = batch.y.ndim == 2 and batch.y.is_floating_point()  # probabilities, as of mixed samples
        if batch.y.shape != (len(batch),) and not soft:
            raise InputError(f"labels must be one class a sample, (B,) = [{len(batch)}], got {[*batch.y.shape]}")
        known = is_labeled(batch.y).all(dim=1) if soft else is_labeled(batch.y)
        known = known if batch.kind is None else known & (batch.kind != LabelKind.PSEUDO)
        return known.unsqueeze(1)

    def refreshed(self, rows: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored pseudo-labels as probabilities (N, C), and their weights, (N,)."""
        if rows.kind is None or rows.y is None:
            return no_pseudo_labels(outputs, outputs[:, 0])
        accepted = rows.kind == LabelKind.PSEUDO
        weight = accepted.to(outputs)
        if rows.weight is not None:
            weight = weight * rows.weight.to(outputs)
        if rows.soft is not None:
            return rows.soft.to(outputs), weight
        if rows.y.ndim == 2:  # mixed pseudo-labels
            return torch.where(accepted[:, None], rows.y, 0).to(outputs), weight
        return F.one_hot(torch.where(accepted, rows.y, 0), outputs.shape[-1]).to(outputs), weight

    def check_labels(self, y: Tensor, outputs: int, data: Any, owner: str) -> None:
        """Raise InputError if a class has training images, but no label."""
        check_classes(y, outputs, data, owner)

    def make_round(
        self,
        index: Tensor,
        y: Tensor,
        predictions: Tensor,
        select: Select,
        previous: Any,
        epoch: int,
    ) -> tuple[PoolLabels, Tensor]:
        """Return a round, and the given classes (M,)."""
        unlabeled = self.unknown(y)[:, 0]
        parts = predictions[unlabeled], index[unlabeled], select, predictions[~unlabeled]
        return make_pseudo_labels(*parts, previous=previous, epoch=epoch), y[~unlabeled].long()

    def collapse(self, table: Any, given: Tensor) -> str | None:
        """Return the text of a warning if one class absorbs the others in a round, else None."""
        classes = int(torch.cat([table.label, given]).max()) + 1
        accepted = torch.bincount(table.label, weights=table.weight.double(), minlength=classes)
        return collapse_text(accepted, torch.bincount(given, minlength=classes), len(table.label))
