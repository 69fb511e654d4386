"""The base of all modules: training on hard targets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.base import (
    Task,
    at_least_float32,
    check_row_fields,
    is_stateful,
    mean_loss,
    predicted_labels,
    reset_state,
    row_values,
    to_probabilities,
)
from kd_lightning.losses.coarse import coarse_rows
from kd_lightning.modules._shared.checks import check_choice, check_number_of_outputs, check_start
from kd_lightning.modules._shared.epoch_means import EpochMeans
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.modules._shared.finite_check import FiniteCheck
from kd_lightning.modules._shared.network_errors import explain_shapes, explain_single_row
from kd_lightning.modules._shared.optimizers import build_optimizers
from kd_lightning.modules._shared.schedules import check_schedules
from kd_lightning.runs.report.log_figure import log_figure
from kd_lightning.runs.resume import prepare_resume, store_position
from kd_lightning.runs.weights import check_fit, match_keys


class LossTerm(NamedTuple):
    """One term of the objective, ``weight * value``. The logged value is unweighted."""

    weight: float
    value: Tensor


class SupervisedModule(LightningModule):
    """Train a student on hard targets: the baseline, the training of teachers, and the base of every method.

    A method adds its constructor and :meth:`losses`, and passes the arguments below on as ``**kwargs``. A batch is a
    ``Batch``, or ``(x, y)`` of any DataLoader.

    Logs ``train/loss`` and each term as ``train/<name>``, as means over the epoch. Validation and test log ``loss``
    (hard), ``accuracy``, ``f1`` (macro), ``calibration_error`` and, with a teacher, ``teacher_accuracy``,
    ``agreement`` and ``teacher_kl`` (KL at temperature 1, in nats).

    Args:
        student: Network that gives logits: (B, C) for multiclass and multilabel, (B,) or (B, 1) for binary.
        task: ``"multiclass"`` (y holds class indices), ``"multilabel"`` (zeros and ones, (B, L)) or ``"binary"``.
            A missing label is -100, or NaN if y is floating point.
        hard_loss: Loss with reduction "mean" or "none", called as ``(logits, target)`` with the labeled rows. If a
            multilabel row misses some labels, it gets the known entries as one flat row. It may declare ``row_fields``
            to get ``kind`` or ``index`` of each row, see :mod:`kd_lightning.losses.protocols`. Coarse labels always
            use :class:`~kd_lightning.losses.CoarseLoss`, and count as much as others. Default: None, which means
            cross-entropy (on logits, for the other two tasks).
        optimizer: Called with the parameters that require a gradient.
        lr_scheduler: Called with the optimiser. ReduceLROnPlateau follows its ``monitor``, or ``val/loss`` if it has
            none. Default: None, which means a constant learning rate.
        lr_interval: When the scheduler steps: each ``"epoch"`` or each optimiser ``"step"``.
        num_classes: Number of outputs that the student must have. Default: None, which means the number of the
            datamodule's classes, where it is known (``class_names``).

    Raises:
        InputError: If the task or the interval is unknown. In a fit, if the student has another number of outputs or
            nothing to train, if a label is no class, or if OneCycleLR ends before training does.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        task: Task = "multiclass",
        hard_loss: nn.Module | None = None,
        optimizer: OptimizerCallable = Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("task", task, ("multiclass", "multilabel", "binary"))
        check_choice("lr_interval", lr_interval, ("epoch", "step"))
        self.save_hyperparameters("task", "lr_interval")
        self.student = student
        self.task: Task = task
        default = nn.CrossEntropyLoss() if task == "multiclass" else nn.BCEWithLogitsLoss()
        self.hard_loss = default if hard_loss is None else hard_loss
        if getattr(self.hard_loss, "reduction", "mean") not in ("mean", "none"):
            raise InputError(f"hard_loss: its reduction must be mean or none, got {self.hard_loss.reduction!r}")
        check_row_fields("hard_loss", self.hard_loss)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        if num_classes is not None and num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self._outputs_are_checked = True  # until a fit begins
        # One for each data loader, made at the first batch, whose logits have the number of classes.
        self._evaluations: dict[int, Evaluation] = {}
        # The teacher's logits on evaluation data: {(stage, loader, batch): (index, logits)}.
        self._teacher_logits_cache: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self._finite_check = FiniteCheck()
        self._epoch_means = EpochMeans()

    def forward(self, x: Tensor) -> Tensor:
        """Return the student's logits."""
        with explain_shapes(x):
            logits = logits_of(self.student(x), "the student")
        if not self._outputs_are_checked and self.is_fitting:
            names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
            check_number_of_outputs(logits, self.task, self.num_classes, names)
            self._outputs_are_checked = True
        return logits

    def setup(self, stage: str) -> None:
        """Runs at the start of fit, validate, test and predict. Resets what an earlier run stored."""
        self._evaluations.clear()
        self._teacher_logits_cache.clear()
        self._finite_check = FiniteCheck()
        self._epoch_means = EpochMeans()
        self._outputs_are_checked = stage != TrainerFn.FITTING
        check_start(self.student, self._trainer, stage)
        if stage == TrainerFn.FITTING:
            reset_state(self.hard_loss)

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer is fitting this module: not validate, test or predict, and no fit that has ended."""
        if self._trainer is None:
            return False
        state = self.trainer.state
        return state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    # What a method overrides.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of the objective, by name."""
        return {"hard": LossTerm(1.0, self.hard_term(self(batch.x), batch))}

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """Return the logits that validation and test compare the student with. Default: None, for no teacher."""
        return None

    def make_evaluation(self, classes: int) -> Evaluation:
        """Make the metrics of one pass over one data loader."""
        return Evaluation(self.task, classes)

    # The hard term.

    def hard_term(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the hard loss over the labeled rows, scaled so that processes and accumulated batches add up.

        The sum over processes and batches is the mean over all labels of the optimiser step: each mean is multiplied
        by its share of the labels. Without labels the term is 0, and has a gradient of 0.
        """
        value, labels = self.compute_hard_loss(logits, batch)
        if batch.mean_labels is None:
            batch.mean_labels = self._mean_over_processes(labels, logits)
        return value * (labels / max(batch.mean_labels, 1e-9) if labels else 1.0)

    def compute_hard_loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean hard loss over the known labels, coarse ones included, and the number of these labels."""
        logits = at_least_float32(logits)
        value, labels = self._fine_hard_loss(logits, batch)
        if batch.candidates is None or not len(batch):
            return value, labels
        coarse = batch.candidates.any(dim=1)
        if self.task != "multiclass" or batch.candidates.shape != logits.shape:
            shapes = f"{[*batch.candidates.shape]} do not fit logits of shape {[*logits.shape]}"
            raise InputError(f"coarse labels are for the multiclass task; {self.task} candidates of shape {shapes}")
        rows = coarse_rows(logits[coarse], batch.candidates[coarse])
        rows = rows if batch.weight is None else rows * batch.weight[coarse]
        total = labels + len(rows)
        return (value * labels + rows.sum()) / max(total, 1), total

    def _fine_hard_loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Return the same as :meth:`compute_hard_loss`, without the coarse labels."""
        if batch.weight is not None and (self.task == "multilabel" or batch.weight.shape != (len(batch),)):
            raise InputError(
                f"weights must be one a row, (B,) = [{len(batch)}], in the multiclass or binary task; "
                f"got {[*batch.weight.shape]} for {self.task}"
            )
        y = batch.y
        if y is None:
            return logits[:0].sum(), 0
        if self.task == "binary":
            logits, y = logits.flatten(), y.flatten()
        classes = self.task == "multiclass"
        if y.shape != logits.shape[: 1 if classes else 2] or (classes and logits.ndim != 2):
            raise InputError(f"{self.task} labels of shape {[*y.shape]} do not fit logits of shape {[*logits.shape]}")
        fields = row_values(self.hard_loss, batch)
        weight = batch.weight
        known = is_labeled(y) if batch.labeled is None or not _must_synchronize(y) else None
        if known is not None and known.all():  # all rows: indexing would take longer
            known = rows = None
        else:
            rows = batch.labeled if known is None else known if known.ndim == 1 else known.any(dim=1)
        if rows is not None and (known is not None or len(rows) < len(y)):
            fields = {name: values[rows] for name, values in fields.items()}
            weight = None if weight is None else weight[rows]
            logits, y = logits[rows], y[rows]
        if known is not None and not (known := known[rows]).all():
            logits, y = logits[known], y[known]
        if y.numel() == 0 and not is_stateful(self.hard_loss):  # a stateful loss runs on every process
            return logits.sum(), 0
        if not _must_synchronize(y):
            self._check_labels(y, logits)
        y = y.long() if self.task == "multiclass" else y.to(logits.dtype)
        return mean_loss(self.hard_loss, logits, y, weight, **fields), y.numel()

    def _check_labels(self, y: Tensor, logits: Tensor) -> None:
        """Raise InputError for a label that is no class of the logits."""
        top = logits.shape[1] - 1 if self.task == "multiclass" else 1
        if y.numel() and (y.min() < 0 or y.max() > top):
            bad = y[(y < 0) | (y > top)][0].item()
            raise InputError(
                f"labels must be 0 ... {top} (the student gives {[*logits.shape][1:] or 1} logits), or -100 (NaN "
                f"where floats) for a missing one; got {bad:g}"
            )

    def _mean_over_processes(self, count: int, like: Tensor) -> float:
        """Return the mean of a count over all processes, which must all call this."""
        if self._trainer is None or not self.trainer.training or self.trainer.world_size == 1:
            return float(count)
        total = torch.tensor(float(count), device=like.device)
        return float(self.trainer.strategy.reduce(total, reduce_op="mean"))

    # The steps.

    def on_train_start(self) -> None:
        """Runs before the first epoch. Raises InputError if a learning rate schedule ends before training does."""
        self._check_schedules()
        self._log_means_of_whole_epoch()  # of an epoch that was interrupted after its last batch

    def _check_schedules(self) -> None:
        check_schedules(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Runs for each training batch, also without a Trainer. Returns the weighted sum of the terms."""
        batch = Batch.from_any(batch)
        with explain_single_row(len(batch)):
            terms = self.losses(batch)
        self._finite_check.record({name: value for name, (_, value) in terms.items()}, self.global_step)
        if self._may_synchronize(batch.x):
            self._finite_check.check()
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        if self._trainer is not None:
            rows: dict[str, Any] = dict.fromkeys(terms, len(batch))
            if batch.mean_labels is not None:
                # Hard terms are means over labels; a batch without any counts next to nothing.
                hard = [name for name in terms if name.endswith("hard")]
                rows |= dict.fromkeys(hard, max(float(batch.mean_labels), 1e-9))
            for name, (weight, value) in terms.items():
                self._record_mean(f"train/{name}", value, rows[name])
                if name != "hard":
                    self._record_mean(f"{name}_weight", weight, len(batch))
            self._record_mean("train/loss", loss, len(batch))
            if self._is_logging_step():
                self.log("train/loss_step", loss)  # not in the progress bar, which would synchronize each step
        return loss

    def _may_synchronize(self, x: Tensor) -> bool:
        """Whether reading a value costs little: on the CPU, and where the logger reads values anyway."""
        return not _must_synchronize(x) or self._trainer is None or self._is_logging_step()

    def _is_logging_step(self) -> bool:
        """Whether a logger logs after this step, or the epoch ends with it."""
        trainer: Any = self.trainer
        step, last, every = self.global_step + 1, trainer.max_steps, trainer.log_every_n_steps
        return bool(trainer.is_last_batch or -1 < last <= step or (every > 0 and step % every == 0))

    def _record_mean(self, name: str, value: Tensor | float, rows: float) -> None:
        """Add a value to the epoch's mean of this name, with ``rows`` as its weight."""
        self._epoch_means.add(name, value, rows)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Runs after each training batch. Logs the epoch's means after the last, before callbacks read them."""
        self._log_means_of_whole_epoch()

    def on_train_epoch_end(self) -> None:
        """Runs at the end of each training epoch. Logs the epoch's means if it ended before its last batch."""
        self._epoch_means.log(self)

    def _log_means_of_whole_epoch(self) -> None:
        steps = self.trainer.max_steps
        if self.trainer.is_last_batch or self.trainer.should_stop or -1 < steps <= self.global_step:
            self._epoch_means.log(self)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each validation batch. Updates the metrics, and returns the predicted labels."""
        return self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each test batch. Updates the metrics, and returns the predicted labels."""
        return self._evaluate("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each batch of predict. Returns probabilities (B, C), or (B,) for the binary task."""
        return to_probabilities(self(Batch.from_any(batch).x), self.task)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:
        batch = replace(Batch.from_any(batch), candidates=None)  # metrics count fine labels alone
        logits = self(batch.x)
        teacher = self._cached_teacher_logits((stage, dataloader_idx, batch_idx), batch)
        if dataloader_idx not in self._evaluations:
            classes = 1 if self.task == "binary" else logits.shape[-1]
            self._evaluations[dataloader_idx] = self.make_evaluation(classes).to(logits.device)
        evaluation = self._evaluations[dataloader_idx]
        evaluation.check(logits, teacher)  # before the labels, whose error would hide that the student does not fit
        evaluation.update(logits, batch.y, *self.compute_hard_loss(logits, batch), teacher)
        return predicted_labels(logits, self.task)

    def _cached_teacher_logits(self, key: tuple[str, int, int], batch: Batch) -> Tensor | None:
        """Return the teacher's logits. They are computed once if the batch has the ``index`` of its samples."""
        index, logits = self._teacher_logits_cache.get(key, (None, None))
        if index is not None and batch.index is not None and torch.equal(index, batch.index.cpu()):
            assert logits is not None
            return logits.to(batch.x.device)
        logits = self.teacher_logits(batch)
        if logits is not None and batch.index is not None:
            self._teacher_logits_cache[key] = (batch.index.cpu(), logits.cpu())
        return logits

    def on_validation_epoch_end(self) -> None:
        """Runs at the end of each validation. Logs its metrics."""
        self._log_evaluations("val")

    def on_test_epoch_end(self) -> None:
        """Runs at the end of the test. Logs its metrics and figures."""
        data = getattr(self.trainer, "datamodule", None)
        prefix = "transductive/test" if getattr(data, "transductive", False) else "test"
        self._log_figures(prefix, lambda evaluation: evaluation.figures(getattr(data, "class_names", None)))
        self._log_evaluations(prefix)

    def _log_figures(self, prefix: str, figures: Callable[[Evaluation], dict[str, Callable[[], Figure]]]) -> None:
        """Log the figures of each data loader. Their numbers are gathered from all processes."""
        for number, evaluation in self._evaluations.items() if self.loggers else ():
            for name, draw in figures(evaluation).items():
                log_figure(self, _metric_name(prefix, name, number), draw)

    def _log_evaluations(self, prefix: str) -> None:
        for number, evaluation in self._evaluations.items():
            values = {_metric_name(prefix, name, number): value for name, value in evaluation.compute().items()}
            # compute() has gathered all processes; sync_dist only avoids Lightning's warning
            for name, value in values.items():
                self.log(name, value, prog_bar="/accuracy" in name, sync_dist=True)
        self._evaluations.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Raises InputError if a term or weight is not finite.

        Adds what an exact resume needs.
        """
        self._finite_check.check(checkpoint["state_dict"])
        if self._trainer is not None:
            store_position(self.trainer, checkpoint)
            self._epoch_means.store(self, checkpoint)

    def on_train_end(self) -> None:
        """Runs at the end of training, before the student is deployed. Raises InputError as before a checkpoint."""
        self._finite_check.check(self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Raises InputError, in one line, if they do not fit."""
        if self._trainer is not None and self.strict_loading:
            name = type(self).__name__
            state = checkpoint["state_dict"] = match_keys(checkpoint["state_dict"], self.state_dict())
            check_fit(state, self.state_dict(), f"ckpt_path: the checkpoint does not fit {name}")
        if self.is_fitting:
            prepare_resume(self.trainer, checkpoint)
            self._epoch_means.restore(self, checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Runs at the start of fit. Builds the optimiser of all trainable parameters, and the scheduler."""
        return build_optimizers(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_interval)


def _must_synchronize(tensor: Tensor) -> bool:
    """Whether reading a value waits until its device has finished all its work."""
    return tensor.device.type != "cpu"


def _metric_name(prefix: str, name: str, loader: int) -> str:
    """Return ``prefix/name``, with the number of the data loader if it is not the first."""
    return f"{prefix}/{name}" + (f"/{loader}" if loader else "")
