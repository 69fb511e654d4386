"""The metrics of validation and test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Accuracy, CalibrationError, ConfusionMatrix, F1Score, MeanMetric, Metric, SumMetric

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task, predicted_labels, to_probabilities
from kd_lightning.modules._shared.checks import check_at_least_two
from kd_lightning.modules._shared.counting_metrics import BinaryCalibrationSums, MacroF1
from kd_lightning.teachers.teacher import check_outputs

_MOST_CLASSES = 1000  # of a confusion matrix


class Evaluation(nn.Module):
    """The metrics of one pass over one data loader. :meth:`compute` gathers all processes.

    Their memory grows with C, not with its square; the confusion matrix is an exception, for tests alone.

    Args:
        task: The module's task.
        classes: Number of classes or labels C. A single label of the multilabel task is a binary task.

    Raises:
        InputError: If there is one class alone.
    """

    def __init__(self, task: Task, classes: int) -> None:
        super().__init__()
        check_at_least_two(task, classes)
        task = "binary" if classes == 1 else task
        plain: dict[str, Any] = {"task": task, "num_classes": classes, "num_labels": classes}
        labels = plain | {"ignore_index": IGNORE_INDEX}
        self.task = task
        self.classes = classes
        self.known = SumMetric()
        self.loss = MeanMetric()
        self.accuracy = Accuracy(**labels, average="micro")
        self.f1 = MacroF1(classes) if task == "multiclass" else F1Score(**labels, average="macro")
        # torchmetrics has no multilabel calibration error, so each label counts as one binary prediction
        self.calibration_error: Metric = (
            BinaryCalibrationSums()
            if task == "multilabel"
            else CalibrationError(task, num_classes=classes, ignore_index=IGNORE_INDEX)
        )
        self.confusion: Any = None
        self.teacher_known = SumMetric()
        self.teacher_accuracy = Accuracy(**labels, average="micro")
        self.agreement = Accuracy(**plain, average="micro")
        self.teacher_kl = MeanMetric()
        self.divergence = KDLoss(temperature=1.0, task=task, reduction="none")

    def add_confusion_matrix(self, announce: bool = True) -> None:
        """Also count the confusion matrix, unless it had more than 1000 classes. Call it before the first batch.

        Args:
            announce: Whether to print that it is left out.
        """
        classes = self.classes
        if self.task != "multiclass" or classes <= _MOST_CLASSES:
            options: dict[str, Any] = {"task": self.task, "num_classes": classes, "num_labels": classes}
            self.confusion = ConfusionMatrix(**options, ignore_index=IGNORE_INDEX)
        elif announce:
            rank_zero_info(f"test/confusion_matrix is left out: at most {_MOST_CLASSES} classes, got {classes}")

    def check(self, logits: Tensor, teacher: Tensor | None) -> None:
        """Raise InputError if the teacher's logits do not fit the student's."""
        check_outputs(logits, teacher)

    @torch.no_grad()
    def update(
        self,
        logits: Tensor,
        y: Tensor | None,
        loss: Tensor,
        labels: int,
        teacher: Tensor | None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            logits: The student's logits (B, C), or (B,) for the binary task.
            y: The labels, -100 or NaN where missing.
            loss: The hard loss, a mean over the known labels.
            labels: The number of known labels.
            teacher: The teacher's logits, of the student's shape.
            class_weights: If the loss has class weights, their sum over the known labels. The batches' losses are
                weighted by it.
        """
        probabilities = to_probabilities(logits, self.task)
        self.known.update(labels)
        self.teacher_known.update(0 if teacher is None else len(teacher))
        if teacher is not None:
            self.agreement.update(probabilities, predicted_labels(teacher, self.task))
            self.teacher_kl.update(self.divergence(logits, teacher))
        if y is None or not labels:
            return
        target = torch.where(is_labeled(y), y, IGNORE_INDEX).long()
        target = target.flatten() if self.task == "binary" else target
        self.loss.update(loss, labels if class_weights is None else class_weights)
        self.accuracy.update(probabilities, target)
        self.f1.update(probabilities, target)
        if self.confusion is not None:
            self.confusion.update(probabilities, target)
        if self.task == "multilabel":
            self.calibration_error.update(probabilities.flatten(), target.flatten())
        else:
            self.calibration_error.update(probabilities, target)
        if teacher is not None:
            self.teacher_accuracy.update(to_probabilities(teacher, self.task), target)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name: those that need labels or a teacher only if some process had them."""
        labels, teacher = bool(self.known.compute()), bool(self.teacher_known.compute())
        names = ["loss", "accuracy", "f1", "calibration_error"] if labels else []
        names += ["agreement", "teacher_kl"] if teacher else []
        names += ["teacher_accuracy"] if labels and teacher else []
        metrics = {name: getattr(self, name) for name in names}
        return {name: metric.compute() for name, metric in metrics.items() if isinstance(metric, Metric)}

    def figures(self, classes: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
        """Return functions that draw the figures. Their numbers are gathered from all processes here.

        Args:
            classes: Class names.

        Returns:
            ``confusion_matrix`` if it was counted (see :meth:`add_confusion_matrix`) and there were labels: with class
            names up to 50 classes, and with numbers up to 20.
        """
        if self.confusion is None or not self.known.compute():
            return {}
        return {"confusion_matrix": partial(self._draw_confusion, self.confusion.compute(), classes)}

    def _draw_confusion(self, matrix: Tensor, classes: Sequence[str] | None) -> Figure:
        count = len(matrix)
        if count > 50:  # a tick for each class would take seconds
            return _draw_large_confusion(matrix)
        assert self.confusion is not None
        names = list(classes) if classes is not None and len(classes) == count else None
        figure: Figure
        figure, _ = self.confusion.plot(matrix, add_text=count <= 20, labels=names)
        return figure


def _draw_large_confusion(matrix: Tensor) -> Figure:
    """Draw a matrix (C, C) as an image; of the multilabel task (L, 2, 2) one row for each label."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix.flatten(1).cpu().numpy(), aspect="auto", interpolation="nearest")
    if matrix.ndim == 2:
        axes.set(xlabel="predicted class", ylabel="true class")
    else:
        axes.set(xticks=range(4), xticklabels=["true negative", "false positive", "false negative", "true positive"])
        axes.set(ylabel="label")
    return figure
