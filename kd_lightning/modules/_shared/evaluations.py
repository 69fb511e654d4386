"""The evaluations of a module in one stage: its metrics by data loader, and the teacher's outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.losses.protocols import is_own
from kd_lightning.modules._shared.dense import dense_predictions
from kd_lightning.modules._shared.hard_loss import hard_loss_of, labels_fit
from kd_lightning.modules._shared.own_evaluation import OwnEvaluation
from kd_lightning.runs.figures.log_figure import log_figure

if TYPE_CHECKING:
    from kd_lightning.modules.supervised import SupervisedModule

_MOST_STORED = 2**28  # bytes of the teacher's logits on evaluation data
_MOST_CLASSES = 20
"""Number of classes up to which the recall of each is logged; beyond, that of a monitored class."""
_IN_PROGRESS_BAR = ("/accuracy", "/rmse", "/mean_iou")


class Evaluations(dict[int, Any]):
    """The metrics of validation or test, by the number of the data loader.

    Each is made at its loader's first batch, whose outputs have the number of classes.
    """

    def __init__(self) -> None:
        super().__init__()
        # the teacher's logits on evaluation data: {(stage, loader, batch): (index, logits)}
        self._teacher_logits: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Remove all metrics and logits."""
        super().clear()
        self._teacher_logits.clear()

    def evaluate(self, module: SupervisedModule, stage: str, batch: Batch, batch_idx: int, loader: int) -> Tensor:
        """Evaluate a module on a batch, and return the labels that it predicts.

        Args:
            module: The module.
            stage: "val" or "test".
            batch: The batch.
            batch_idx: Number of the batch.
            loader: Number of the data loader.
        """
        batch = batch if batch.candidates is None else replace(batch, candidates=None)  # metrics count fine labels
        # first: a student's activations would take memory meanwhile
        teacher = None if batch.is_padding else module._cached_teacher_logits((stage, loader, batch_idx), batch)
        logits = outputs = module(batch.x)
        if not module._is_comparable(logits, teacher):
            teacher = None
        batch, logits, *taught = module._evaluation_rows(batch, logits, teacher)
        teacher = taught[0] if taught else None
        if loader not in self:
            evaluation = _make(module, logits, batch)
            if stage == "test" and module.loggers:
                evaluation.add_confusion_matrix(announce=not self)
            self[loader] = evaluation.to(logits.device)
        evaluation = self[loader]
        evaluation.check(logits, teacher)  # before the labels, whose error would hide that the student does not fit
        loss, labels, weights = hard_loss_of(module.hard_loss, module.task, logits, batch)
        predicted: Tensor = evaluation.update(logits, batch.y, loss, labels, teacher, weights)
        return predicted if module.class_dim is None else dense_predictions(outputs, module.task, module.class_dim)

    def teacher_logits(
        self, key: tuple[str, int, int], batch: Batch, compute: Callable[[Batch], Tensor | None]
    ) -> Tensor | None:
        """Return the teacher's logits.

        They are computed once if the batch has the ``index`` of its samples, and as long as all take little memory.

        Args:
            key: Stage, number of the loader, and number of the batch.
            batch: The batch.
            compute: What computes them.
        """
        index, logits = self._teacher_logits.get(key, (None, None))
        if index is not None and batch.index is not None and torch.equal(index, batch.index.cpu()):
            assert logits is not None
            return logits.to(batch.device)
        logits = compute(batch)
        if logits is not None and batch.index is not None:
            stored = sum(part.nbytes for _, part in self._teacher_logits.values())
            if stored + logits.nbytes <= _MOST_STORED:
                self._teacher_logits[key] = (batch.index.cpu(), logits.cpu())
        return logits

    def log_figures(
        self, module: LightningModule, prefix: str, figures: Callable[[Any], dict[str, Callable[[], Figure]]]
    ) -> None:
        """Log the figures of each data loader. Their numbers are gathered from all processes."""
        for number, evaluation in self.items() if module.loggers else ():
            for name, draw in figures(evaluation).items():
                log_figure(module, _metric_name(prefix, name, number), draw)

    def log(self, module: LightningModule, prefix: str) -> None:
        """Log the metrics of each data loader, and remove them."""
        for name, value in self._values(prefix, _monitored(module), class_names(module)):
            # compute() has gathered all processes; sync_dist only avoids Lightning's warning
            module.log(name, value, prog_bar=any(part in name for part in _IN_PROGRESS_BAR), sync_dist=True)
        super().clear()

    def _values(self, prefix: str, monitored: set[str], classes: list[str]) -> Iterator[tuple[str, Tensor]]:
        for number, evaluation in self.items():
            for name, value in evaluation.compute().items():
                if not value.ndim:
                    yield _metric_name(prefix, name, number), value
                    continue
                for class_name, of_class in zip(_different_names(classes, len(value)), value, strict=True):
                    full = _metric_name(prefix, f"{name}_{class_name}", number)
                    # without NaN of an absent class, which a checkpoint that follows it would take for the best value
                    if not of_class.isnan() and (full in monitored or len(value) <= _MOST_CLASSES):
                        yield full, of_class


def class_names(module: LightningModule) -> list[str]:
    """Return the names of the datamodule's classes; none if they are unknown."""
    return [*map(str, getattr(getattr(module.trainer, "datamodule", None), "class_names", None) or ())]


def _different_names(classes: list[str], count: int) -> list[str]:
    """Return the names of classes, or their numbers if the names are unknown. Those of one name have their number, too.

    >>> _different_names(["crane", "cat", "crane"], 3)
    ['crane 0', 'cat', 'crane 2']
    """
    if len(classes) != count:
        return [*map(str, range(count))]
    times = Counter(classes)
    return [name if times[name] == 1 else f"{name} {number}" for number, name in enumerate(classes)]


def _monitored(module: LightningModule) -> set[str]:
    """Return the names of the metrics that callbacks and schedulers follow."""
    followers: list[Any] = [*module.trainer.callbacks, *module.trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
    return {name for one in followers if isinstance(name := getattr(one, "monitor", None), str)}


def _make(module: SupervisedModule, logits: Tensor, batch: Batch) -> Any:
    """Make the metrics of a data loader, by its first batch."""
    if (metrics := module.configure_metrics()) is not None:
        return OwnEvaluation(module.task, metrics)
    if is_own(module.hard_loss) and batch.y is not None and not labels_fit(module.task, logits, batch.y):
        return OwnEvaluation(module.task, {})
    single = module.task == "binary" or (module.task == "regression" and logits.ndim == 1)
    return module.make_evaluation(1 if single else logits.shape[-1])


def _metric_name(prefix: str, name: str, loader: int) -> str:
    """Return ``prefix/name``, with the number of the data loader if it is not the first."""
    return f"{prefix}/{name}" + (f"/{loader}" if loader else "")
