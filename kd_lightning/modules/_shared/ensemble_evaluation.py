"""What validation and test measure of several teachers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.losses.base import Task, decide
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.teachers.ensemble import Ensemble


class EnsembleEvaluation(Evaluation):
    """The metrics of a student beside K teachers; where :class:`Evaluation` has a teacher, it is their average.

    Args:
        ensemble: The teachers.
        task: The module's task.
        classes: Number of classes or labels C.
    """

    def __init__(self, ensemble: Ensemble, task: Task, classes: int) -> None:
        super().__init__(task, classes)
        self._ensemble = (ensemble,)  # a tuple, or it would become a part of this
        self.classes = classes
        self.known_classes = known = ensemble.knows(classes)
        self.common = {(i, j): known[i] & known[j] for i, j in combinations(range(len(ensemble)), 2)}

        def metrics(number: int) -> Any:  # a ModuleList of Metrics
            options: dict[str, Any] = {"task": task, "num_classes": classes, "num_labels": classes}
            return nn.ModuleList(Accuracy(**options, average="micro", ignore_index=IGNORE_INDEX) for _ in range(number))

        self.accuracies = metrics(len(ensemble))
        self.agreements = metrics(len(ensemble))  # with the student
        self.ensemble_agreements = metrics(len(ensemble))
        self.between = metrics(len(self.common))
        self.disagreement = MeanMetric()

    def check(self, logits: Tensor, teacher: Tensor | None) -> None:
        """Refuse teachers that do not fit; ``teacher`` holds every teacher's logits (K, B, C)."""
        if teacher is not None:
            self._ensemble[0].check_classes(teacher, self.classes)

    @torch.no_grad()
    def update(self, logits: Tensor, y: Tensor | None, loss: Tensor, labels: int, teacher: Tensor | None) -> None:
        """Take in a batch; ``teacher`` holds every teacher's logits (K, B, C)."""
        if teacher is None:
            super().update(logits, y, loss, labels, None)
            return
        (ensemble,) = self._ensemble
        pooled = ensemble.pool(teacher)
        super().update(logits, y, loss, labels, pooled)
        decisions = [decide(answer, self.task) for answer in teacher]
        student, together = decide(logits, self.task), decide(pooled, self.task)
        target = None if y is None or not labels else torch.where(is_labeled(y), y, IGNORE_INDEX).long()
        for number, (decision, known) in enumerate(zip(decisions, self.known_classes, strict=True)):
            said = self._judged(decision, known)
            self.agreements[number].update(student, said)
            self.ensemble_agreements[number].update(together, said)
            if target is not None:
                self.accuracies[number].update(decision, self._judged(target.reshape(decision.shape), known))
        for metric, ((i, j), common) in zip(self.between, self.common.items(), strict=True):
            metric.update(decisions[i], self._judged(decisions[j], common))
            if common.sum() > (self.task == "multiclass"):  # one class alone is certain
                one, other = teacher[i][:, common], teacher[j][:, common]
                self.disagreement.update(self.divergence(one, other))
                self.disagreement.update(self.divergence(other, one))

    def compute(self) -> dict[str, Tensor]:
        """The figures, by name."""
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

    def _judged(self, target: Tensor, known: Tensor) -> Tensor:
        """Without the labels, of many, that a teacher does not know."""
        return target.masked_fill(~known.to(target.device), IGNORE_INDEX) if self.task == "multilabel" else target

    def figures(self, classes: Sequence[str] | None) -> dict[str, Figure]:
        """The confusion matrix, and the teachers' agreement."""
        return super().figures(classes) | self.teacher_figures()

    def teacher_figures(self) -> dict[str, Figure]:
        """How often each two teachers decide the same."""
        if not self.common or not self.teacher_known.compute():
            return {}
        count = len(self.accuracies)
        matrix = torch.eye(count)
        for (i, j), metric in zip(self.common, self.between, strict=True):
            matrix[i, j] = matrix[j, i] = metric.compute()
        figure, axes = plt.subplots(figsize=(1.5 + 0.6 * count, 1 + 0.6 * count), layout="constrained")
        axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        for (i, j), share in zip(torch.cartesian_prod(*2 * [torch.arange(count)]), matrix.flatten(), strict=True):
            axes.text(int(j), int(i), f"{share:.2f}", ha="center", va="center", color="w" if share > 0.5 else "k")
        axes.set(xticks=range(count), yticks=range(count), xlabel="teacher", ylabel="teacher", title="agreement")
        return {"teachers_agreement": figure}
