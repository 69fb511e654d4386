"""What pseudo-labels are in a task: the contract of all tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.pseudo_labels.ledger import write_round
from kd_lightning.pseudo_labels.report import class_figure, confidence_figure, round_metrics, true_labels
from kd_lightning.pseudo_labels.selection.base import Selection
from kd_lightning.pseudo_labels.table import PoolLabels

Select = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A :class:`~kd_lightning.pseudo_labels.Selection`, or a function that is called as one."""


class PseudoLabelTask(ABC):
    """What predictions and pseudo-labels are in a task.

    A sample has K labels, each of which may be given, or have a pseudo-label: K is 1 in the multiclass and binary
    tasks. A row of predictions has C numbers.

    Args:
        name: The task.
    """

    remedy: ClassVar[str] = "lower the threshold, take another selection such as TopKPerClass"
    """What accepts more pseudo-labels, for a message."""

    def __init__(self, name: Task) -> None:
        self.name = name

    @property
    def num_outputs(self) -> int | None:
        """Number C of predictions of a sample, if the task decides it; else None."""
        return None

    def check_online(self, owner: str) -> None:  # noqa: B027  (most tasks have nothing to refuse)
        """Raise InputError if pseudo-labels of single batches cannot be made in this task."""

    def number_of_views(self, num_views: int | None) -> int | None:
        """Return the number of views of each sample in a round; None for one under the evaluation transform.

        Args:
            num_views: The number that the user sets, or None.
        """
        if num_views is not None:
            raise InputError(f"num_views: {num_views} is for task: regression, got task: {self.name}")
        return None

    @abstractmethod
    def accept_all(self) -> Selection:
        """Return a selection that accepts each pseudo-label."""

    @abstractmethod
    def rows(self, outputs: Tensor, network: str) -> Tensor:
        """Return a network's outputs as (N, C); InputError names the network if they have another shape."""

    @abstractmethod
    def predictions(self, outputs: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return what a selection gets, (N, C), at least float32.

        Args:
            outputs: (N, C).
            candidates: The classes that coarse labels allow, (N, C) booleans; all False in rows without one.
        """

    @abstractmethod
    def confidence(self, predictions: Tensor) -> Tensor:
        """Return the probability of each pseudo-label if all are accepted, (N,) or (N, K)."""

    @abstractmethod
    def compare(self, outputs: Tensor, target: Tensor, hard_loss: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the loss of each pseudo-label, in the shape of its weight, and the predictions (N, C).

        Args:
            outputs: The student's outputs, (N, C).
            target: The pseudo-labels, (N, C).
            hard_loss: The module's hard loss, which pseudo-labels of classes do not use.
        """

    @abstractmethod
    def given(self, batch: Batch) -> Tensor:
        """Return which labels of a batch are known, and no pseudo-labels: (B, K) booleans.

        K is 1 if the batch does not show how many labels a sample has.
        """

    def without_pseudo_labels(self, batch: Batch, given: Tensor) -> Batch:
        """Return a batch without the pseudo-labels of rows that have given labels, too; ``given`` as above."""
        return batch

    @abstractmethod
    def refreshed(self, rows: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pseudo-labels that a callback has stored, (N, C), and their weights, (N,) or (N, K).

        Args:
            rows: The rows that have a label which is not given.
            outputs: The student's outputs for them, (N, C).
        """

    def unknown(self, y: Tensor) -> Tensor:
        """Return which labels of the samples of a pool get a pseudo-label, (N, K) booleans."""
        return ~is_labeled(columns(y))

    def check_given(self, y: Tensor, data: Any, owner: str) -> None:  # noqa: B027  (most tasks have nothing to check)
        """Raise InputError if a round cannot be made from the given labels, whatever network labels the others.

        Args:
            y: The labels that training may see, (N,) or (N, K).
            data: The datamodule.
            owner: Name of the caller, for the message.
        """

    @abstractmethod
    def check_labels(self, y: Tensor, outputs: int, data: Any, owner: str) -> None:
        """Raise InputError if the given labels cannot teach the student what to predict.

        Args:
            y: The labels that training may see, (N,) or (N, K).
            outputs: Number of predictions C.
            data: The datamodule.
            owner: Name of the caller, for the message.
        """

    @abstractmethod
    def make_round(
        self,
        index: Tensor,
        y: Tensor,
        predictions: Tensor,
        select: Select,
        previous: PoolLabels | None,
        epoch: int,
    ) -> tuple[PoolLabels, Tensor]:
        """Return a round of pseudo-labels, and the given labels in the form of the round's report.

        Args:
            index: Samples of the pool, (N,), ascending.
            y: Their given labels, (N,) or (N, K).
            predictions: (N, C), or (N, V, C) of V views.
            select: The selection.
            previous: The round before. None if this is the first.
            epoch: Epoch at whose start the round is made.
        """

    # The report of a round: here of labels that have a confidence.

    def write(
        self,
        folder: Path,
        table: Any,
        names: Sequence[str] | None,
        path_of: Callable[[int], str | None],
        content_of: Callable[[int], str],
    ) -> None:
        """Write a round to the ledger, see :func:`~kd_lightning.pseudo_labels.ledger.write_round`."""
        write_round(folder, table, names, path_of, content_of)

    def metrics(self, table: Any, given: Tensor, truth_of: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """Return the metrics of a round, by name.

        Args:
            table: The round.
            given: The given labels, as :meth:`make_round` returns them.
            truth_of: Returns the true labels of samples, by index. None if they are not known.
        """
        return round_metrics(table, given, None if truth_of is None else true_labels(table, truth_of))

    def figures(self, table: Any, given: Tensor, selection: Selection) -> dict[str, Callable[[], Figure]]:
        """Return functions that draw the figures of a round, by name."""
        threshold = getattr(selection, "threshold", None) or None  # a line in the figure, if there is one
        return {
            "confidence": lambda: confidence_figure(table, threshold),
            "classes": lambda: class_figure(table, given),
        }

    def collapse(self, table: Any, given: Tensor) -> str | None:
        """Return the text of a warning if one class absorbs the others in a round, else None. Multiclass only.

        Args:
            table: The round.
            given: The given labels, as :meth:`make_round` returns them.
        """
        return None

    def nearest(self, table: Any) -> str:
        """Return the pseudo-label that is nearest to being accepted, for a message."""
        return f"the highest probability is {table.confidence.max():.3f}"


def columns(values: Tensor) -> Tensor:
    """Return values of one label a row, (N,), as (N, 1); those of several as they are."""
    return values.unsqueeze(1) if values.ndim == 1 else values


def no_pseudo_labels(outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return targets and weights of 0, as before the first refresh, in the shapes of the arguments."""
    return torch.zeros_like(outputs), torch.zeros_like(weights)
