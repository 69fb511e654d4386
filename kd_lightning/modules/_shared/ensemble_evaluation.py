"""The metrics of validation and test with several teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.losses.base import Task, predicted_labels
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.teachers.ensemble import Ensemble


class EnsembleEvaluation(Evaluation):
    """The metrics of a student and K teachers. The teacher of :class:`Evaluation`'s metrics is their average.

    Args:
        ensemble: The teachers.
        task: The module's task.
        classes: Number of classes or labels C.
    """

    def __init__(self, ensemble: Ensemble, task: Task, classes: int) -> None:
        super().__init__(task, classes)
        task = self.task
        self._ensemble = (ensemble,)  # in a tuple, or it would become a submodule
        self.known_classes = known = ensemble.known_classes(classes)
        self.common = {(i, j): known[i] & known[j] for i, j in combinations(range(len(ensemble)), 2)}

        def metrics(number: int) -> Any:  # a ModuleList of Metrics
            options: dict[str, Any] = {"task": task, "num_classes": classes, "num_labels": classes}
            return nn.ModuleList(Accuracy(**options, average="micro", ignore_index=IGNORE_INDEX) for _ in range(number))

        self.accuracies = metrics(len(ensemble))
        self.agreements = metrics(len(ensemble))  # with the student
        self.ensemble_agreements = metrics(len(ensemble))
        self.pair_agreements = metrics(len(self.common))
        self.disagreement = MeanMetric()

    def check(self, logits: Tensor, teacher: Tensor | None) -> None:
        """Raise InputError if the teachers' logits (K, B, C) do not fit the student's."""
        if teacher is not None:
            self._ensemble[0].check_classes(teacher, self.classes)

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
        """Add a batch; ``teacher`` holds all teachers' logits (K, B, C), and the rest is as of :class:`Evaluation`."""
        if teacher is None:
            super().update(logits, y, loss, labels, None, class_weights)
            return
        (ensemble,) = self._ensemble
        pooled = ensemble.pool(teacher)
        super().update(logits, y, loss, labels, pooled, class_weights)
        predictions = [predicted_labels(outputs, self.task) for outputs in teacher]
        student, average = predicted_labels(logits, self.task), predicted_labels(pooled, self.task)
        target = None if y is None or not labels else torch.where(is_labeled(y), y, IGNORE_INDEX).long()
        for number, (predicted, known) in enumerate(zip(predictions, self.known_classes, strict=True)):
            masked = self._mask_unknown(predicted, known)
            self.agreements[number].update(student, masked)
            self.ensemble_agreements[number].update(average, masked)
            if target is not None:
                self.accuracies[number].update(predicted, self._mask_unknown(target.reshape(predicted.shape), known))
        for metric, ((i, j), common) in zip(self.pair_agreements, self.common.items(), strict=True):
            metric.update(predictions[i], self._mask_unknown(predictions[j], common))
            if common.sum() > (self.task == "multiclass"):  # a single class has probability 1
                one, other = teacher[i][:, common], teacher[j][:, common]
                self.disagreement.update(self.divergence(one, other))
                self.disagreement.update(self.divergence(other, one))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name, with those of each teacher."""
        values = super().compute()
        kinds = {"agreement": self.agreements, "ensemble_agreement": self.ensemble_agreements}
        if "teacher_accuracy" in values:
            kinds["accuracy"] = self.accuracies
        if "agreement" in values:
            for name, metrics in kinds.items():
                values |= {f"teacher_{number}_{name}": metric.compute() for number, metric in enumerate(metrics)}
            if any(common.sum() > (self.task == "multiclass") for common in self.common.values()):
                values["disagreement"] = self.disagreement.compute()
        return values

    def _mask_unknown(self, target: Tensor, known: Tensor) -> Tensor:
        """For the multilabel task, set the labels that a teacher does not know to "missing"."""
        return target.masked_fill(~known.to(target.device), IGNORE_INDEX) if self.task == "multilabel" else target

    def figures(self, classes: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
        """Return functions that draw the confusion matrix and the teachers' agreement."""
        return super().figures(classes) | self.teacher_figures()

    def teacher_figures(self) -> dict[str, Callable[[], Figure]]:
        """Return a function that draws the share of equal predictions of each pair of teachers."""
        if not self.common or not self.teacher_known.compute():
            return {}
        count = len(self.accuracies)
        matrix = torch.eye(count)
        for (i, j), metric in zip(self.common, self.pair_agreements, strict=True):
            matrix[i, j] = matrix[j, i] = metric.compute()
        return {"teachers_agreement": partial(_draw_agreement, matrix)}


def _draw_agreement(matrix: Tensor) -> Figure:
    count = len(matrix)
    figure = Figure(figsize=(1.5 + 0.6 * count, 1 + 0.6 * count), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="Blues")
    for (i, j), share in zip(torch.cartesian_prod(*2 * [torch.arange(count)]), matrix.flatten(), strict=True):
        axes.text(int(j), int(i), f"{share:.2f}", ha="center", va="center", color="w" if share > 0.5 else "k")
    axes.set(xticks=range(count), yticks=range(count), xlabel="teacher", ylabel="teacher", title="agreement")
    return figure
