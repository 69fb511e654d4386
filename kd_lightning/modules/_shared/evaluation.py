"""What validation and test measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Accuracy, CalibrationError, ConfusionMatrix, F1Score, MeanMetric, Metric, SumMetric

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task, decide, to_probabilities
from kd_lightning.teachers.teacher import check_outputs


class Evaluation(nn.Module):
    """The metrics of one pass over one data loader; several processes are gathered when computing.

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
        # torchmetrics has no calibration of many labels: it is that of their single decisions
        single: Any = "multiclass" if task == "multiclass" else "binary"
        self.calibration_error = CalibrationError(single, num_classes=classes, ignore_index=IGNORE_INDEX)
        self.confusion = ConfusionMatrix(**labels)
        self.teacher_known = SumMetric()
        self.teacher_accuracy = Accuracy(**labels, average="micro")
        self.agreement = Accuracy(**plain, average="micro")
        self.teacher_kl = MeanMetric()
        self.divergence = KDLoss(temperature=1.0, task=task, reduction="none")

    def check(self, logits: Tensor, teacher: Tensor | None) -> None:
        """Refuse a teacher that does not fit."""
        check_outputs(logits, teacher)

    @torch.no_grad()
    def update(self, logits: Tensor, y: Tensor | None, loss: Tensor, labels: int, teacher: Tensor | None) -> None:
        """Take in a batch.

        Args:
            logits: (B, C), or (B,) for the binary task.
            y: The labels, missing ones included.
            loss: The hard loss, a mean over the known labels.
            labels: How many labels are known.
            teacher: The teacher's logits.
        """
        probabilities = to_probabilities(logits, self.task)
        self.known.update(labels)
        self.teacher_known.update(0 if teacher is None else len(teacher))
        if teacher is not None:
            self.agreement.update(probabilities, decide(teacher, self.task))
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
        """The figures, by name; those of labels and of a teacher only where there were any, on any process."""
        labels, teacher = bool(self.known.compute()), bool(self.teacher_known.compute())
        names = ["loss", "accuracy", "f1", "calibration_error"] if labels else []
        names += ["agreement", "teacher_kl"] if teacher else []
        names += ["teacher_accuracy"] if labels and teacher else []
        metrics = {name: getattr(self, name) for name in names}
        return {name: metric.compute() for name, metric in metrics.items() if isinstance(metric, Metric)}

    def figures(self, classes: Sequence[str] | None) -> dict[str, Figure]:
        """The confusion matrix, where there were labels; names and numbers are written in where they can be read."""
        if not self.known.compute():
            return {}
        count = len(self.confusion.compute())
        names = list(classes) if classes is not None and len(classes) == count <= 50 else None
        figure: Figure
        figure, _ = self.confusion.plot(add_text=count <= 20, labels=names)
        return {"confusion_matrix": figure}
