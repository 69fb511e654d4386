"""The metrics of validation and test with several teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import class_labels, is_labeled
from kd_lightning.losses.base import Task, predicted_labels
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.modules._shared.regression_evaluation import RegressionEvaluation
from kd_lightning.teachers.ensemble import Ensemble


class EnsembleEvaluation(Evaluation):
    """The metrics of a student and K teachers. The teacher of :class:`Evaluation`'s metrics is their average.

    Args:
        ensemble: The teachers.
        task: The module's task.
        classes: Number of classes or labels C.
        dense: Whether rows are positions, see :class:`Evaluation`.
    """

    def __init__(self, ensemble: Ensemble, task: Task, classes: int, dense: bool = False) -> None:
        super().__init__(task, classes, dense)
        self._ensemble = (ensemble,)  # in a tuple, or it would become a submodule
        known = ensemble.known_classes(classes)
        count, least = len(ensemble), 2 if self.task == "multiclass" else 1  # a single class has probability 1
        shared = (known.unsqueeze(1) & known).sum(dim=-1) >= least  # (K, K)
        self.counted: Tensor
        self.pairs = [pair for pair in combinations(range(count), 2) if shared[pair]]
        # of the multilabel task, a teacher's labels count alone: (K, 1, L), else (K, 1)
        counted = known.unsqueeze(1) if self.task == "multilabel" else torch.ones(count, 1, dtype=torch.bool)
        self.register_buffer("counted", counted, persistent=False)
        for name in ("accuracies", "agreements", "ensemble_agreements"):
            self.start(name, 2, count)  # hits and decisions
        self.start("pair_agreements", 2, count, count)
        self.start("disagreement", dtype=torch.float32)
        self.start("disagreement_rows")

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
    ) -> Tensor:
        """Add a batch; ``teacher`` holds all teachers' logits (K, B, C), and the rest is as of :class:`Evaluation`."""
        if teacher is None:
            return super().update(logits, y, loss, labels, None, class_weights)
        (ensemble,) = self._ensemble
        pooled = ensemble.pool(teacher)
        student = super().update(logits, y, loss, labels, pooled, class_weights)
        average = predicted_labels(pooled, self.task)
        predictions = predicted_labels(teacher.flatten(0, 1), self.task).view(len(ensemble), *student.shape)
        counted = self.counted.expand_as(predictions)
        self.add("agreements", _hits(predictions, student, counted))
        self.add("ensemble_agreements", _hits(predictions, average, counted))
        if y is not None and labels:
            y = class_labels(y) if self.task == "multiclass" else y
            known = counted & is_labeled(y).view_as(student)
            self.add("accuracies", _hits(predictions, y.view_as(student), known))
        if len(ensemble) > 1:
            rows = [_hits(predictions, one, counted & mask) for one, mask in zip(predictions, counted, strict=True)]
            self.add("pair_agreements", torch.stack(rows, dim=1))
        self._add_disagreement(ensemble, teacher)
        return student

    def _add_disagreement(self, ensemble: Ensemble, teacher: Tensor) -> None:
        """Add the KL divergence of each row between both of each pair of teachers, on the classes that both know."""
        known = ensemble.known_classes(self.classes)
        if known.all():  # each teacher's probabilities once
            logs = _log_probabilities(teacher, self.task)
            outputs = 1 if self.task == "multiclass" else self.classes
            for one in logs if self.pairs else ():
                self.add("disagreement", (one.exp() * (one - logs)).sum() / outputs)
            self.add("disagreement_rows", 2 * len(self.pairs) * teacher.shape[1])
            return
        for i, j in self.pairs:
            common = known[i] & known[j]
            one, other = (teacher[k][:, common] for k in (i, j))
            values = self.divergence(one, other), self.divergence(other, one)
            self.add("disagreement", torch.stack(values).sum())
            self.add("disagreement_rows", 2 * len(one))

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the metrics of sums over all processes, with those of each teacher."""
        values = super()._values(sums)
        kinds = {"agreement": "agreements", "ensemble_agreement": "ensemble_agreements"}
        if "teacher_accuracy" in values:
            kinds["accuracy"] = "accuracies"
        if "agreement" in values:
            for name, kind in kinds.items():
                values |= {f"teacher_{number}_{name}": share for number, share in enumerate(_shares(sums[kind]))}
            if self.pairs:
                values["disagreement"] = sums["disagreement"] / sums["disagreement_rows"]
        return values

    def figures(self, classes: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
        """Return functions that draw the confusion matrix and the teachers' agreement."""
        return super().figures(classes) | self.teacher_figures()

    def teacher_figures(self) -> dict[str, Callable[[], Figure]]:
        """Return a function that draws the share of equal predictions of each pair of teachers."""
        sums = self.of_all_processes()
        if len(sums["agreements"][0]) < 2 or not sums["teacher_rows"]:
            return {}
        return {"teachers_agreement": partial(_draw_agreement, _shares(sums["pair_agreements"]).cpu())}


class EnsembleRegressionEvaluation(RegressionEvaluation):
    """The metrics of a student and K teachers of the regression task. The teacher of the base's is their average.

    For each teacher k also ``teacher_<k>_mae`` and ``teacher_<k>_rmse``, and ``teacher_<k>_difference``, the root of
    the mean squared difference to the student. Outputs that a teacher does not know are left out.

    Args:
        ensemble: The teachers.
        outputs: Number of outputs D.
        device: The device of the sums.
    """

    def __init__(self, ensemble: Ensemble, outputs: int, device: torch.device | None = None) -> None:
        super().__init__(outputs, device)
        self._ensemble = (ensemble,)  # in a tuple, or it would become a submodule
        self.known: Tensor
        self.register_buffer("known", ensemble.known_classes(outputs), persistent=False)
        for name in ("each_absolute", "each_squares", "each_labels", "each_differences", "each_values"):
            self.start(name, len(ensemble), dtype=self.kind)

    def check(self, values: Tensor, teacher: Tensor | None) -> None:
        """Raise InputError if the teachers' values (K, B, D) do not fit the student's."""
        if teacher is not None:
            self._ensemble[0].check_classes(teacher, self.outputs)

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
        """Add a batch; ``teacher`` holds all teachers' values (K, B, D); the rest is as of the base class."""
        if teacher is None:
            return super().update(values, y, loss, labels, None, class_weights)
        predicted = super().update(values, y, loss, labels, self._ensemble[0].pool(teacher), class_weights)
        each, known = teacher.to(self.kind), self.known.unsqueeze(1).expand_as(teacher)
        student = values.detach().to(self.kind).view(len(values), -1)
        self.add("each_differences", (each - student).masked_fill(~known, 0).square().flatten(1).sum(dim=1))
        self.add("each_values", known.flatten(1).sum(dim=1))
        if y is not None and labels and y.numel() == student.numel():
            y = y.view_as(student)
            known = known & is_labeled(y)
            error = (each - y.to(self.kind)).masked_fill(~known, 0).flatten(1)
            self.add("each_absolute", error.abs().sum(dim=1))
            self.add("each_squares", error.square().sum(dim=1))
            self.add("each_labels", known.flatten(1).sum(dim=1))
        return predicted

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name: those that need targets or teachers only if some process had them."""
        found, sums = super().compute(), self.of_all_processes()
        for number in range(len(self._ensemble[0])):
            part = {name: sums[f"each_{name}"][number].float() for name in ("absolute", "squares", "labels")}
            if part["labels"]:
                found[f"teacher_{number}_mae"] = part["absolute"] / part["labels"]
                found[f"teacher_{number}_rmse"] = (part["squares"] / part["labels"]).sqrt()
            if values := sums["each_values"][number]:
                found[f"teacher_{number}_difference"] = (sums["each_differences"][number] / values).sqrt().float()
        return found


def _hits(predictions: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """Return for each teacher how often its predictions (K, B, ...) are the others (B, ...), and out of how many."""
    return torch.stack([((predictions == other) & counted).flatten(1).sum(dim=1), counted.flatten(1).sum(dim=1)])


def _log_probabilities(logits: Tensor, task: Task) -> Tensor:
    """Return log-probabilities (K, B, C); for other tasks (K, B, 2L), of 1 and of 0."""
    if task == "multiclass":
        return logits.log_softmax(dim=-1)
    return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


def _shares(hits: Tensor) -> Tensor:
    """Return hits / decisions; 0 if there are none."""
    return hits[0] / hits[1].clamp(min=1)


def _draw_agreement(matrix: Tensor) -> Figure:
    count = len(matrix)
    figure = Figure(figsize=(1.5 + 0.6 * count, 1 + 0.6 * count), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="Blues")
    for (i, j), share in zip(torch.cartesian_prod(*2 * [torch.arange(count)]), matrix.flatten(), strict=True):
        axes.text(int(j), int(i), f"{share:.2f}", ha="center", va="center", color="w" if share > 0.5 else "k")
    axes.set(xticks=range(count), yticks=range(count), xlabel="teacher", ylabel="teacher", title="agreement")
    return figure
