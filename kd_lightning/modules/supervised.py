"""The base of all modules: learning from hard targets alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.base import Task, mean_loss, row_fields_of, to_probabilities
from kd_lightning.losses.coarse import coarse_rows
from kd_lightning.modules._shared.epoch_means import EpochMeans
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.modules._shared.finite_check import FiniteCheck
from kd_lightning.runs.weights import check_fit

# how torch says that inputs do not fit a layer
_SHAPES = re.compile(r"shapes? |channels|expected .*(input|dim)|size of tensor|sizes? mismatch", re.IGNORECASE)


class LossTerm(NamedTuple):
    """One term of the objective: ``weight * value``; the value is charted unweighted."""

    weight: float
    value: Tensor


class SupervisedModule(LightningModule):
    """Train a student on hard targets: the baseline, how teachers are trained, and the base of every method.

    A method adds its constructor and :meth:`losses`. Batches are ``Batch``es or ``(x, y)`` of any DataLoader.
    Charts ``train/loss`` and each term as ``train/<name>`` (means over the epoch); for validation and test ``loss``
    (hard), ``accuracy``, ``f1`` (macro), ``calibration_error`` and, with a teacher, ``teacher_accuracy``,
    ``agreement`` and ``teacher_kl`` (KL at temperature 1).

    Args:
        student: Gives logits: (B, C) for multiclass and multilabel, (B,) or (B, 1) for binary.
        task: ``"multiclass"`` (y holds class indices), ``"multilabel"`` (zeros and ones, (B, L)) or ``"binary"``.
            A missing label is -100, or NaN where floats.
        hard_loss: Called as ``(logits, target)`` on the labeled rows only, a mean over them. None: cross-entropy, on
            logits for the other two tasks. With labels missing inside a row (multilabel) it sees the known entries
            as one flat row. With ``reduction="none"`` the mean is taken here. One whose forward takes ``kind`` or
            ``index`` is told these of each row; one that takes ``index`` is called without rows, too, since other
            processes may have some to remember, and is told to ``forget()`` as a fit begins, if it can. Coarse labels
            have :class:`~kd_lightning.losses.CoarseLoss`, whatever the hard loss, and count as much as others.
        optimizer: Takes the parameters that require a gradient.
        lr_scheduler: Takes the optimiser. ReduceLROnPlateau follows its ``monitor``, else ``val/loss``; it is the one
            thing that a resume does not continue exactly, since Lightning leaves out its step at the end of the epoch
            in which a run goes on.
        lr_interval: Whether the scheduler steps each ``"epoch"`` or each optimiser ``"step"``.

    Raises:
        InputError: For an unknown task or interval, and while training for labels outside the classes.
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
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        # Made when the first logits tell the number of classes, one for each data loader.
        self._evaluations: dict[int, Evaluation] = {}
        # The teacher's logits on evaluation sets, which do not change: {(stage, loader, batch): (index, logits)}.
        self._teacher_outputs: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self._finite = FiniteCheck()
        self._epoch_means = EpochMeans()

    def forward(self, x: Tensor) -> Tensor:
        """The student's logits."""
        try:
            return logits_of(self.student(x), "the student")
        except RuntimeError as error:
            if not _SHAPES.search(str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise InputError(f"the student cannot take inputs of shape {[*x.shape]}: {reason}") from error

    def setup(self, stage: str) -> None:
        """Forget what an earlier run measured: its data may have been others, and an interruption may have cut it."""
        self._evaluations.clear()
        self._teacher_outputs.clear()
        self._finite = FiniteCheck()
        self._epoch_means = EpochMeans()
        for part in self.hard_loss.modules() if stage == TrainerFn.FITTING else ():
            if callable(forget := getattr(part, "forget", None)):
                forget()

    # What a method changes.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The terms of the objective, by name."""
        return {"hard": LossTerm(1.0, self.hard_term(self(batch.x), batch))}

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """What the student is compared with in validation and test; None without a teacher."""
        return None

    def make_evaluation(self, classes: int) -> Evaluation:
        """What takes in the logits and the teacher's over a pass."""
        return Evaluation(self.task, classes)

    # The hard term.

    def hard_term(self, logits: Tensor, batch: Batch) -> Tensor:
        """The hard loss on the labeled rows, scaled so that processes and accumulated batches add up.

        That is, a mean over all labels of the optimiser step: each process's mean times its share of the labels.
        Without labels it is 0, and still in the graph.
        """
        value, labels = self.hard_loss_of(logits, batch)
        if batch.mean_labels is None:
            batch.mean_labels = self._mean_over_processes(labels, logits)
        return value * (labels / max(batch.mean_labels, 1e-9) if labels else 1.0)

    def hard_loss_of(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """The mean hard loss over the known labels, coarse ones included, and their number."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        value, labels = self._of_known(logits, batch)
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

    def _of_known(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """The same without the coarse ones."""
        if batch.weight is not None and (self.task == "multilabel" or batch.weight.shape != (len(batch),)):
            raise InputError(
                f"weights must be one a row, (B,) = [{len(batch)}], and have no meaning for the multilabel task, where "
                f"a part of a row's labels may be missing; got {[*batch.weight.shape]} for {self.task}"
            )
        y = batch.y
        if y is None:
            return logits[:0].sum(), 0
        if self.task == "binary":
            logits, y = logits.flatten(), y.flatten()
        classes = self.task == "multiclass"
        if y.shape != logits.shape[: 1 if classes else 2] or (classes and logits.ndim != 2):
            raise InputError(f"{self.task} labels of shape {[*y.shape]} do not fit logits of shape {[*logits.shape]}")
        told = {name: getattr(batch, name) for name in row_fields_of(self.hard_loss)}
        told = {name: values for name, values in told.items() if values is not None}
        weight = batch.weight
        known = is_labeled(y) if batch.labeled is None or not _makes_wait(y) else None
        if known is not None and known.all():  # nothing to pick, which would take longer
            known = rows = None
        else:
            rows = batch.labeled if known is None else known if known.ndim == 1 else known.any(dim=1)
        if rows is not None and (known is not None or len(rows) < len(y)):
            told = {name: values[rows] for name, values in told.items()}
            weight = None if weight is None else weight[rows]
            logits, y = logits[rows], y[rows]
        if known is not None and not (known := known[rows]).all():
            logits, y = logits[known], y[known]
        if y.numel() == 0 and "index" not in told:  # all processes must come to a loss that remembers samples
            return logits.sum(), 0
        if not _makes_wait(y):
            self._check_labels(y, logits)
        y = y.long() if self.task == "multiclass" else y.to(logits.dtype)
        return mean_loss(self.hard_loss, logits, y, weight, **told), y.numel()

    def _check_labels(self, y: Tensor, logits: Tensor) -> None:
        top = logits.shape[1] - 1 if self.task == "multiclass" else 1
        if y.numel() and (y.min() < 0 or y.max() > top):
            bad = y[(y < 0) | (y > top)][0].item()
            raise InputError(
                f"labels must be 0 ... {top} (the student gives {[*logits.shape][1:] or 1} logits), or -100 (NaN "
                f"where floats) for a missing one; got {bad:g}"
            )

    def _mean_over_processes(self, labels: int, like: Tensor) -> float:
        if self._trainer is None or not self.trainer.training or self.trainer.world_size == 1:
            return float(labels)
        total = torch.tensor(float(labels), device=like.device)
        return float(self.trainer.strategy.reduce(total, reduce_op="mean"))

    # The steps.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on a batch; works without a Trainer."""
        batch = Batch.from_any(batch)
        terms = self.losses(batch)
        self._finite.note({name: value for name, (_, value) in terms.items()}, self.global_step)
        if self._may_wait(batch.x):
            self._finite.check()
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        if self._trainer is not None:
            rows: dict[str, Any] = dict.fromkeys(terms, len(batch))
            if batch.mean_labels is not None:
                # charts the mean over labels, of a teacher that learns, too; a batch without any has next to no say
                hard = [name for name in terms if name.endswith("hard")]
                rows |= dict.fromkeys(hard, max(float(batch.mean_labels), 1e-9))
            for name, (weight, value) in terms.items():
                self._log_epoch(f"train/{name}", value, rows[name])
                if name != "hard":
                    self._log_epoch(f"{name}_weight", weight, len(batch))
            self._log_epoch("train/loss", loss, len(batch))
            if self._is_logging_step():
                self.log("train/loss_step", loss)  # not in the progress bar, which would wait for each
        return loss

    def _may_wait(self, x: Tensor) -> bool:
        """Whether looking at a value costs little: on the CPU, and where the logger looks anyway."""
        return not _makes_wait(x) or self._trainer is None or self._is_logging_step()

    def _is_logging_step(self) -> bool:
        """Whether a logger looks after this step, or the epoch ends with it."""
        trainer: Any = self.trainer
        step, last, every = self.global_step + 1, trainer.max_steps, trainer.log_every_n_steps
        return bool(trainer.is_last_batch or -1 < last <= step or (every > 0 and step % every == 0))

    def _log_epoch(self, name: str, value: Tensor | float, rows: float) -> None:
        """Chart the mean over the epoch, in which this value counts as many rows."""
        self._epoch_means.add(name, value, rows)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch's means with its last step, so that callbacks find them at its end."""
        steps = self.trainer.max_steps
        if self.trainer.is_last_batch or self.trainer.should_stop or -1 < steps <= self.global_step:
            self._log_means()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means where it has ended unexpectedly."""
        self._log_means()

    def _log_means(self) -> None:
        if not self._epoch_means:
            return
        strategy = self.trainer.strategy
        means = self._epoch_means.take(self.device, lambda sums: strategy.reduce(sums, reduce_op="sum"))
        for name, mean in means.items():
            bar = name == "train/loss"
            self.log(name, mean, on_step=False, on_epoch=True, prog_bar=bar, batch_size=1, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a validation batch."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a test batch."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities (B, C); (B,) for the binary task."""
        return to_probabilities(self(Batch.from_any(batch).x), self.task)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        batch = replace(Batch.from_any(batch), candidates=None)  # the figures are of fine labels
        logits = self(batch.x)
        teacher = self._kept_teacher_logits((stage, dataloader_idx, batch_idx), batch)
        if dataloader_idx not in self._evaluations:
            classes = 1 if self.task == "binary" else logits.shape[-1]
            self._evaluations[dataloader_idx] = self.make_evaluation(classes).to(logits.device)
        evaluation = self._evaluations[dataloader_idx]
        evaluation.check(logits, teacher)  # before a label complains of what is the student's fault
        loss, labels = self.hard_loss_of(logits, batch)
        evaluation.update(logits, batch.y, loss, labels, teacher)

    def _kept_teacher_logits(self, key: tuple[str, int, int], batch: Batch) -> Tensor | None:
        """The teacher's logits, computed once where the batch tells which samples it holds."""
        index, logits = self._teacher_outputs.get(key, (None, None))
        if index is not None and batch.index is not None and torch.equal(index, batch.index.cpu()):
            assert logits is not None
            return logits.to(batch.x.device)
        logits = self.teacher_logits(batch)
        if logits is not None and batch.index is not None:
            self._teacher_outputs[key] = (batch.index.cpu(), logits.cpu())
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self._log_evaluations("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test measured, and its figures where the logger takes them."""
        data = getattr(self.trainer, "datamodule", None)
        prefix = "transductive/test" if getattr(data, "transductive", False) else "test"
        self._add_figures(prefix, lambda evaluation: evaluation.figures(getattr(data, "class_names", None)))
        self._log_evaluations(prefix)

    def _add_figures(self, prefix: str, figures: Callable[[Evaluation], dict[str, Figure]]) -> None:
        """Hand each loader's figures to the loggers that take some."""
        boards = [logger for logger in self.loggers if isinstance(logger, TensorBoardLogger)]
        for number, evaluation in self._evaluations.items() if boards else ():
            for name, figure in figures(evaluation).items():
                for board in boards:
                    board.experiment.add_figure(_name(prefix, name, number), figure, self.global_step)
                plt.close(figure)

    def _log_evaluations(self, prefix: str) -> None:
        for number, evaluation in self._evaluations.items():
            values = {_name(prefix, name, number): value for name, value in evaluation.compute().items()}
            # computing has gathered all processes, so sync_dist changes nothing but Lightning's warning
            for name, value in values.items():
                self.log(name, value, prog_bar="/accuracy" in name, sync_dist=True)
        self._evaluations.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the last good checkpoint rather than write one of a training that has gone astray."""
        self._finite.check(checkpoint["state_dict"])

    def on_train_end(self) -> None:
        """Look once more before anybody deploys the student."""
        self._finite.check(self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which weights do not fit, before torch lists them all."""
        if self._trainer is not None and self.strict_loading:
            name = type(self).__name__
            check_fit(checkpoint["state_dict"], self.state_dict(), f"ckpt_path: the checkpoint does not fit {name}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser over all that requires a gradient, and the scheduler."""
        return self.optimization(self.parameters(), self.optimizer, self.lr_scheduler)

    def optimization(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        monitor: str = "val/loss",
    ) -> OptimizerLRScheduler:
        """An optimiser over what of the parameters requires a gradient, and its scheduler.

        ReduceLROnPlateau follows ``monitor`` where it names none itself.
        """
        try:
            built = optimizer([p for p in parameters if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer: {error}") from error
        if lr_scheduler is None:
            return built
        try:
            scheduler = lr_scheduler(built)
        except (TypeError, ValueError) as error:
            raise InputError(f"lr_scheduler: {error}") from error
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", monitor)
        return {"optimizer": built, "lr_scheduler": config}  # type: ignore[return-value]


def _makes_wait(tensor: Tensor) -> bool:
    """Whether to look at a value is to wait for the device, and for all that it was given to do."""
    return tensor.device.type != "cpu"


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless the value is one of those allowed."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _name(prefix: str, name: str, loader: int) -> str:
    return f"{prefix}/{name}" + (f"/{loader}" if loader else "")
