"""The metrics of validation and test that a project sets in place of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Metric

from kd_lightning.batch import is_labeled
from kd_lightning.losses.base import Task, to_probabilities
from kd_lightning.modules._shared.counting_metrics import Sums


class OwnEvaluation(Sums):
    """A project's metrics in one pass over one data loader, and the hard loss.

    Each metric is updated with the outputs and the labels of all rows that have a label: probabilities, or the values
    of the regression task. Where labels do not fit the task, with the outputs and labels as they are.

    Args:
        task: The module's task.
        metrics: Metrics by name. Each is a new one.
    """

    def __init__(self, task: Task, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.task = task
        self._metrics = nn.ModuleDict(dict(metrics))
        for name in ("loss", "loss_weight"):
            self.start(name, dtype=torch.float32)

    def check(self, outputs: Tensor, teacher: Tensor | None) -> None:
        """Do nothing: the metrics have no teacher."""

    def add_confusion_matrix(self, announce: bool = True) -> None:
        """Do nothing: there is none."""

    def figures(self, classes: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
        """Return no figure."""
        return {}

    @torch.no_grad()
    def update(
        self,
        outputs: Tensor,
        y: Tensor | None,
        loss: Tensor,
        labels: int,
        teacher: Tensor | None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Add a batch, and return what the metrics got of its outputs; see :class:`Evaluation`."""
        fits = outputs.ndim <= 2
        given = to_probabilities(outputs, self.task) if fits else outputs.detach()
        if y is None or not labels:
            return given
        weight = labels if class_weights is None else class_weights
        self.add("loss", loss * weight)
        self.add("loss_weight", weight)
        y = y.flatten() if self.task == "binary" and fits else y
        known = is_labeled(y)
        known = known.flatten(1).any(dim=1) if known.ndim > 1 else known
        if given.numel() == y.numel() and given.ndim <= 2:  # (B,) and (B, 1)
            given = given.view_as(y)
        for metric in self._own():
            metric.update(given[known], y[known])
        return given

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name; of a pass without labels none."""
        sums = self.of_all_processes()
        if not sums["loss_weight"]:
            return {}
        found = {"loss": sums["loss"] / sums["loss_weight"]}
        return found | {name: metric.compute() for name, metric in zip(self._metrics, self._own(), strict=True)}

    def _own(self) -> list[Any]:
        return [*self._metrics.values()]
