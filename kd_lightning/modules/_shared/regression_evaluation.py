"""The metrics of validation and test of the regression task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.modules._shared.counting_metrics import Sums


class RegressionEvaluation(Sums):
    """The metrics of one pass over one data loader, from sums. :meth:`compute` gathers all processes.

    ``mae`` and ``rmse`` are means over all known targets; ``r2`` is the mean of the outputs' coefficients of
    determination, as torchmetrics' ``R2Score`` computes it. With a teacher also its ``teacher_mae`` and
    ``teacher_rmse``, and ``teacher_difference``, the root of the mean squared difference between student and teacher.

    Args:
        outputs: Number of outputs D.
        device: The device of the sums. They are float64, where it has this type.
    """

    def __init__(self, outputs: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.outputs = outputs
        self.kind = torch.float32 if device is not None and device.type == "mps" else torch.float64
        for name in ("labels", "target", "target_squares", "absolute", "squares"):
            self.start(name, outputs, dtype=self.kind)
        for name in ("loss", "loss_weight", "differences", "teacher_values"):
            self.start(name, dtype=self.kind)
        for name in ("teacher_absolute", "teacher_squares", "teacher_labels"):
            self.start(name, dtype=self.kind)

    def check(self, values: Tensor, teacher: Tensor | None) -> None:
        """Do nothing: a loss between outputs of two shapes is the project's own."""

    def add_confusion_matrix(self, announce: bool = True) -> None:
        """Do nothing: there are no classes."""

    def figures(self, classes: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
        """Return no figure."""
        return {}

    @torch.no_grad()
    def update(
        self,
        values: Tensor,
        y: Tensor | None,
        loss: Tensor,
        labels: int,
        teacher: Tensor | None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Add a batch, and return the student's values.

        Args:
            values: The student's outputs (B, D), or (B,).
            y: The targets (B, D) or (B,), NaN where missing (-100 where they are integers).
            loss: The hard loss, a mean over the known targets.
            labels: The number of known targets.
            teacher: The teacher's outputs. They are left out if their shape is another one.
            class_weights: None: there are no classes.
        """
        kind = self.kind
        student = values.detach().to(kind).view(len(values), -1)
        other = None if teacher is None or teacher.numel() != values.numel() else teacher.to(kind).view_as(student)
        if other is not None:
            self.add("differences", (student - other).square().sum())
            self.add("teacher_values", other.numel())
        if y is None or not labels or y.numel() != student.numel():
            if labels:  # of a project's own loss
                self.add("loss", loss * labels)
                self.add("loss_weight", labels)
            return values.detach()
        self.add("loss", loss * labels)
        self.add("loss_weight", labels)
        y = y.view_as(student)
        known = is_labeled(y)
        target = y.to(kind).masked_fill(~known, 0)
        self.add("labels", known.sum(dim=0))
        self.add("target", target.sum(dim=0))
        self.add("target_squares", target.square().sum(dim=0))
        error = (student - target).masked_fill(~known, 0)
        self.add("absolute", error.abs().sum(dim=0))
        self.add("squares", error.square().sum(dim=0))
        if other is not None:
            error = (other - target).masked_fill(~known, 0)
            self.add("teacher_absolute", error.abs().sum())
            self.add("teacher_squares", error.square().sum())
            self.add("teacher_labels", known.sum())
        return values.detach()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name: those that need targets or a teacher only if some process had them."""
        sums = self.of_all_processes()
        found = {}
        if sums["loss_weight"]:
            found["loss"] = sums["loss"] / sums["loss_weight"]
        if count := sums["labels"].sum():
            found["mae"] = sums["absolute"].sum() / count
            found["rmse"] = (sums["squares"].sum() / count).sqrt()
            spread = sums["target_squares"] - sums["target"].square() / sums["labels"]
            found["r2"] = (1 - sums["squares"] / spread).mean()
        if sums["teacher_values"]:
            found["teacher_difference"] = (sums["differences"] / sums["teacher_values"]).sqrt()
        if sums["teacher_labels"]:
            found["teacher_mae"] = sums["teacher_absolute"] / sums["teacher_labels"]
            found["teacher_rmse"] = (sums["teacher_squares"] / sums["teacher_labels"]).sqrt()
        return {name: value.float() for name, value in found.items()}
