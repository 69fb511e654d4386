"""The metrics of validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Accuracy, CalibrationError, ConfusionMatrix, F1Score, MeanMetric, Metric, SumMetric

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task, predicted_labels, to_probabilities
from kd_lightning.teachers.teacher import check_outputs


class Evaluation(nn.Module):
    """The metrics of one pass over one data loader. :meth:`compute` gathers all processes.

    Args:
        task: The module's task.
        classes: Number of classes or labels C.
    """

    def __init__(self, task: Task, classes: int) -> None:
        super().__init__()
        plain: dict[str, Any] = {"task": task, "num_classes": classes, "num_labels": classes}
        labels = plain | {"ignore_index": IGNORE_INDEX}
        self.task = task
        self.known = SumMetric()
        self.loss = MeanMetric()
        self.accuracy = Accuracy(**labels, average="micro")
        self.f1 = F1Score(**labels, average="macro")
        # torchmetrics has no multilabel calibration error, so each label counts as one binary prediction
        single: Any = "multiclass" if task == "multiclass" else "binary"
        self.calibration_error = CalibrationError(single, num_classes=classes, ignore_index=IGNORE_INDEX)
        self.confusion = ConfusionMatrix(**labels)
        self.teacher_known = SumMetric()
        self.teacher_accuracy = Accuracy(**labels, average="micro")
        self.agreement = Accuracy(**plain, average="micro")
        self.teacher_kl = MeanMetric()
        self.divergence = KDLoss(temperature=1.0, task=task, reduction="none")

    def check(self, logits: Tensor, teacher: Tensor | None) -> None:
        """Raise InputError if the teacher's logits do not fit the student's."""
        check_outputs(logits, teacher)

    @torch.no_grad()
    def update(self, logits: Tensor, y: Tensor | None, loss: Tensor, labels: int, teacher: Tensor | None) -> None:
        """Add a batch.

        Args:
            logits: The student's logits (B, C), or (B,) for the binary task.
            y: The labels, -100 or NaN where missing.
            loss: The hard loss, a mean over the known labels.
            labels: The number of known labels.
            teacher: The teacher's logits, of the student's shape.
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
        self.loss.update(loss, labels)
        self.accuracy.update(probabilities, target)
        self.f1.update(probabilities, target)
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

    def figures(self, classes: Sequence[str] | None) -> dict[str, Figure]:
        """Return the confusion matrix if there were labels, with class names up to 50 and numbers up to 20 classes."""
        if not self.known.compute():
            return {}
        count = len(self.confusion.compute())
        names = list(classes) if classes is not None and len(classes) == count <= 50 else None
        figure: Figure
        figure, _ = self.confusion.plot(add_text=count <= 20, labels=names)
        return {"confusion_matrix": figure}
