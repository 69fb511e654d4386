"""The metrics of validation and test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import ConfusionMatrix

from kd_lightning.batch import IGNORE_INDEX, class_labels, is_labeled
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task, to_probabilities
from kd_lightning.modules._shared.checks import check_at_least_two
from kd_lightning.modules._shared.counting_metrics import (
    CALIBRATION_SHAPE,
    Sums,
    calibration_counts,
    calibration_error,
    class_counts,
    label_counts,
    macro_f1,
    mean_iou,
    recalls,
    zero_and_one,
)
from kd_lightning.runs.figures.confusion_matrix import draw_confusion_matrix
from kd_lightning.teachers.teacher import check_outputs

_MOST_CLASSES = 1000  # of a confusion matrix


class Evaluation(Sums):
    """The metrics of one pass over one data loader, from counts. :meth:`compute` gathers all processes.

    Their memory grows with C, not with its square; the confusion matrix is an exception, for tests alone.

    Args:
        task: The module's task.
        classes: Number of classes or labels C. A single label of the multilabel task is a binary task.
        dense: Whether rows are positions, so that ``mean_iou`` is computed, too (not for the multilabel task).

    Raises:
        InputError: If there is one class alone.
    """

    def __init__(self, task: Task, classes: int, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense and task != "multilabel"
        check_at_least_two(task, classes)
        task = "binary" if classes == 1 else task
        self.task = task
        self.classes = classes
        for name in ("labels", "correct", "teacher_correct", "teacher_rows", "decisions", "agreed"):
            self.start(name)
        for name in ("loss", "loss_weight", "teacher_kl"):
            self.start(name, dtype=torch.float32)
        self.start("class_counts", 3, classes)
        self.start("calibration", *CALIBRATION_SHAPE)
        self.confusion: Any = None
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
    ) -> Tensor:
        """Add a batch, and return the student's predicted labels.

        Args:
            logits: The student's logits (B, C), or (B,) for the binary task.
            y: The labels, -100 or NaN where missing.
            loss: The hard loss, a mean over the known labels.
            labels: The number of known labels.
            teacher: The teacher's logits, of the student's shape.
            class_weights: If the loss has class weights, their sum over the known labels. The batches' losses are
                weighted by it.
        """
        one_of_many, taught = self.task == "multiclass", None
        if teacher is not None:
            divergences = self.divergence(logits, teacher)  # first, since it takes the most memory
            self.add("teacher_kl", divergences.sum())
            self.add("teacher_rows", len(divergences))
            of_teacher = to_probabilities(teacher, self.task)
            taught = of_teacher.argmax(dim=-1) if one_of_many else of_teacher > 0.5
            del of_teacher
        probabilities = to_probabilities(logits, self.task)
        confidence, predicted = probabilities.max(dim=-1) if one_of_many else (probabilities, probabilities > 0.5)
        if taught is not None:
            self.add("agreed", (predicted == taught).sum())
            self.add("decisions", predicted.numel())
        if y is None or not labels:
            return predicted.long()
        weight = labels if class_weights is None else class_weights
        self.add("loss", loss * weight)
        self.add("loss_weight", weight)
        y = y.flatten() if self.task == "binary" else class_labels(y) if one_of_many else y
        known = is_labeled(y)
        target = y.long() if one_of_many else y > 0.5  # where labels are probabilities, the likelier one
        if self.confusion is not None:
            self.confusion.update(probabilities, torch.where(known, target.long(), IGNORE_INDEX))
        self._count(confidence, predicted, taught, target, known)
        return predicted.long()

    def _count(
        self, confidence: Tensor, predicted: Tensor, taught: Tensor | None, target: Tensor, known: Tensor
    ) -> None:
        """Count what needs labels. All are (B,), or (B, L) for the multilabel task; booleans unless multiclass."""
        if self.task != "multiclass":
            self.add("class_counts", label_counts(*(part.view(len(part), -1) for part in (target, predicted, known))))
        if not known.all():
            confidence, predicted, target = confidence[known], predicted[known], target[known]
            taught = None if taught is None else taught[known]
        right = predicted == target
        self.add("labels", right.numel())
        self.add("correct", right.sum())
        if taught is not None:
            self.add("teacher_correct", (taught == target).sum())
        if self.task == "multiclass":
            self.add("class_counts", class_counts(target, predicted, self.classes))
        # torchmetrics has no multilabel calibration error, so each label counts as one binary prediction
        self.add("calibration", calibration_counts(confidence, right if self.task == "multiclass" else target))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name: those that need labels or a teacher only if some process had them.

        ``recall`` has one value a class, (C,), NaN for a class without samples. The binary task has two classes.
        """
        return self._values(self.of_all_processes())

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the metrics of sums over all processes."""
        labels, teacher = bool(sums["labels"]), bool(sums["teacher_rows"])
        found = {}
        if labels:
            found["loss"] = sums["loss"] / sums["loss_weight"]
            found["accuracy"] = sums["correct"] / sums["labels"]
            found["f1"] = macro_f1(sums["class_counts"], of_absent=self.task != "multiclass")
            counts = sums["class_counts"]
            recall = found["recall"] = recalls(
                zero_and_one(counts, sums["labels"]) if self.task == "binary" else counts
            )
            if self.task != "multilabel":
                found["balanced_accuracy"] = recall.nanmean()  # scikit-learn's balanced_accuracy_score
            if self.dense:
                found["mean_iou"] = mean_iou(sums["class_counts"])
            found["calibration_error"] = calibration_error(sums["calibration"])
        if teacher:
            found["agreement"] = sums["agreed"] / sums["decisions"]
            found["teacher_kl"] = sums["teacher_kl"] / sums["teacher_rows"]
        if labels and teacher:
            found["teacher_accuracy"] = sums["teacher_correct"] / sums["labels"]
        return found

    def figures(self, classes: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
        """Return functions that draw the figures. Their numbers are gathered from all processes here.

        Args:
            classes: Class names.

        Returns:
            ``confusion_matrix`` if it was counted (see :meth:`add_confusion_matrix`) and there were labels.
        """
        if self.confusion is None or not self.of_all_processes()["labels"]:
            return {}
        counts = self.confusion.compute().cpu().numpy()
        return {"confusion_matrix": partial(draw_confusion_matrix, counts, classes)}
