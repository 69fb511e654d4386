"""Rows of a batch, and means over all rows of an optimiser step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.base import Task
from kd_lightning.modules._shared.class_weights import ClassWeights
from kd_lightning.modules._shared.dense import count_dense, dense_to_rows
from kd_lightning.modules._shared.hard_loss import hard_loss_of
from kd_lightning.modules._shared.label_counts import count_for_losses
from kd_lightning.modules._shared.student_module import StudentModule


class RowModule(StudentModule):
    """Turn batches into rows, and scale means over rows so that processes and accumulated batches add up.

    A row is a sample, or with ``class_dim`` a position of a dense sample that counts.
    """

    task: Task
    class_dim: int | None
    causal: bool
    hard_loss: nn.Module
    num_classes: int | None
    _class_weights: ClassWeights | None

    def __init__(self, student: nn.Module, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
        self._mean_labels: float | Tensor | None = None  # of this step, see Batch.mean_labels
        self._rows: float = 0  # of this batch; with class_dim their mean over the batches of the step

    @property
    def training_loss(self) -> nn.Module:
        """The hard loss of training: ``hard_loss``, with the class weights if there are any."""
        return self.hard_loss if self._class_weights is None else self._class_weights.loss(self.device)

    def balance_classes(self, data: Any) -> None:
        """Runs at the start of a fit. Computes ``class_weights: balanced`` from the labels that training may see.

        A hard loss that depends on the numbers of labels gets them.

        Args:
            data: The datamodule.
        """
        count_for_losses(self.hard_loss, data, self.num_classes, dense=self.class_dim is not None)
        if self._class_weights is not None:
            self._class_weights.balance(data, self.num_classes)

    def to_rows(self, batch: Batch, *outputs: Tensor) -> tuple[Any, ...]:
        """Return a batch and outputs of one row for each position that counts; without ``class_dim`` as they are.

        Mixed labels get the classes that the outputs have and the labels lack.

        Args:
            batch: The batch.
            outputs: Outputs of student and teachers, of one shape.

        Returns:
            A batch of N rows, which has labels, weights and totals but no inputs, and the outputs (N, C).
        """
        if self.class_dim is None:
            mixed = batch.partner is not None and self.task == "multiclass"
            return _widen(batch, outputs[0]) if mixed else batch, *outputs
        rows, parts = dense_to_rows(batch, outputs, self.task, self.class_dim, self.causal)
        self._rows = len(rows)
        return rows, *parts

    def count_rows(self, batch: Any) -> tuple[float, ...] | None:
        """Runs in the datamodule's loader. Return the numbers of labels and rows of a dense batch; None without them.

        The loader needs them of all batches of an optimiser step, before the first one is computed. If the hard loss
        has class weights, their sum over the labels is the third number.
        """
        if self.class_dim is None:
            return None
        return count_dense(self.unpack(batch), self.task, self.class_dim, self.causal, self.training_loss)

    def step_mean(self, value: Tensor, rows: Batch) -> Tensor:
        """Scale a mean over rows of :meth:`to_rows` so that processes and accumulated batches add up.

        Their sum is the mean over all rows of the optimiser step then. Without ``class_dim``, each batch counts the
        same, and the mean stays as it is.
        """
        if self.class_dim is None:
            return value
        mean = self._mean_over_processes(len(rows), value) if rows.mean_rows is None else rows.mean_rows
        self._rows = mean
        return value if mean == len(rows) else value * (len(rows) / max(mean, 1e-9))

    def hard_term(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the hard loss over the labeled rows, scaled so that processes and accumulated batches add up.

        The sum over processes and batches is the mean over all labels of the optimiser step: each mean is multiplied
        by its share of the labels. Without labels the term is 0, and has a gradient of 0. If the loss has class
        weights, the processes' shares are those of the weights.
        """
        value, labels, weights = hard_loss_of(self.training_loss, self.task, logits, batch)
        mean, of_step = batch.mean_labels, batch.dense_means or ()
        self._mean_labels = mean = self._mean_over_processes(labels, logits) if mean is None else mean
        if weights is not None and len(of_step) > 2:
            return value * (weights / max(of_step[2], 1e-9))
        if weights is None or not self._trains_on_several_processes():
            return value if labels in (0, mean) else value * (labels / max(mean, 1e-9))
        here = torch.stack([weights.float(), weights.new_tensor(labels).float()])
        means: Tensor = self.trainer.strategy.reduce(here, reduce_op="mean")
        mean_weights, mean_here = means.unbind()
        return value * (weights / mean_weights.clamp_min(1e-9)) * (mean_here / max(mean, 1e-9))

    def compute_hard_loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean hard loss over the known labels, coarse ones included, and the number of these labels."""
        return hard_loss_of(self.training_loss, self.task, logits, batch)[:2]

    def _mean_over_processes(self, count: int, like: Tensor) -> float:
        """Return the mean of a count over all processes, which must all call this."""
        if not self._trains_on_several_processes():
            return float(count)
        total = torch.tensor(float(count), device=like.device)
        return float(self.trainer.strategy.reduce(total, reduce_op="mean"))

    def _trains_on_several_processes(self) -> bool:
        return self._trainer is not None and self.trainer.training and self.trainer.world_size > 1


def _widen(batch: Batch, logits: Tensor) -> Batch:
    """Return a batch whose probabilities (B, C) have as many classes as the logits: those added are 0, or NaN."""
    y = batch.y
    if y is None or y.ndim != 2 or logits.ndim != 2:
        return batch
    more = (0 * y[:, :1]).expand(-1, max(0, logits.shape[1] - y.shape[1]))
    return replace(batch, y=torch.cat([y, more], dim=1)) if more.numel() else batch
