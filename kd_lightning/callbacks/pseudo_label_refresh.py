"""Label the unlabeled pool again between epochs."""

from __future__ import annotations

from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from kd_lightning.callbacks.label_sources import (
    Source,
    find_average,
    find_teacher,
    student_of,
    weight_averaging,
)
from kd_lightning.callbacks.pool_predictions import predict_pool, validating
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels import GraphPseudoLabels
from kd_lightning.pseudo_labels.pool import unlabeled_samples
from kd_lightning.pseudo_labels.selection import FixedThreshold, Selection
from kd_lightning.pseudo_labels.selection.base import check_task, one_line
from kd_lightning.pseudo_labels.selection.running_mean import RunningMean
from kd_lightning.pseudo_labels.selection.set_up import set_up
from kd_lightning.pseudo_labels.table import PoolLabels, restore
from kd_lightning.pseudo_labels.tasks import MulticlassTask, PseudoLabelTask, pseudo_label_task
from kd_lightning.ranks import alone
from kd_lightning.runs.figures.log_figure import log_figure, only_warn
from kd_lightning.runs.folder import run_folder, writes_files
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import student_path
from kd_lightning.runs.weights import check_fit
from kd_lightning.teachers.cache_fill import fill_caches


class PseudoLabelRefresh(Callback):
    """Predict the whole unlabeled pool every few epochs, and pass the accepted labels to the datamodule.

    A refresh runs at the start of an epoch. It predicts in eval mode under evaluation transforms (in the regression
    task: under training transforms). Each round replaces
    the one before, so no acceptance is permanent. If the superclass of a sample is known, its pseudo-label lies in that
    superclass (except with :class:`GraphPseudoLabels`). Several processes predict a share each and end with the same
    table.

    Works on any LightningModule whose ``forward`` returns logits, and on any datamodule with the two methods of
    :class:`~kd_lightning.pseudo_labels.PseudoLabelStore`. The module's ``task`` may be multiclass (as it is without
    one), binary or multilabel: then each label of a sample that is not given has a pseudo-label 0 or 1; or regression,
    see below. Modules use the accepted labels as follows:

    - ``PseudoLabelModule(pseudo_labels="refreshed")`` has a loss term for them.
    - ``PseudoLabelModule(pseudo_labels="online")`` ignores them, so the refresh only measures the student's quality.
    - Other modules treat them as labels of this weight. Of a soft label they use the most probable class.

    Each round writes a CSV file to ``pseudo_labels/`` in the run's folder, one row for each sample, or each label of
    it, which ``python -m kd_lightning labels RUN`` reads. The last round runs when training ends. It holds the trained
    student's labels, whatever the source, which are also those of ``predict``. Checkpoints hold the table. Logs under
    ``pseudo_labels/``: ``coverage`` (mean weight: the accepted share, if weights are 0 or 1), ``confidence`` (mean),
    ``flips`` (share that changed since the last round) and ``class_distance`` (total variation distance between the
    classes of accepted and of given labels; of several labels the mean difference of the shares of a 1). If the
    datamodule has ``hidden_truth(index)``, also ``precision`` (of all) and ``accepted_precision``. Figures: the
    confidences with the threshold, and the classes.

    In the regression task, the pseudo-label is the mean of the predictions for ``num_views`` views under the training
    transform, each output by itself; the selection is ``UncertaintyThreshold``. What a view shows depends on (seed,
    sample, number of the view) alone, so the views are the same in each round, on any number of processes. A sample
    whose views are all equal is never accepted, and a transform that is not random is refused. A spread is measured in
    standard deviations of the given labels. Logs in place of those above: ``accepted`` (number), ``coverage``,
    ``spread`` (median), ``accepted_spread``, ``change`` (since the last round), ``std_ratio`` (of accepted to given
    values; far below 1 if only values near the mean are accepted), and against the hidden truth ``mae``, ``rmse``,
    ``r2`` and the same with ``accepted_``. Figures: the spreads with the limit, and the values.

    Args:
        every_n_epochs: Number of epochs from one refresh to the next, at least 1.
        selection: Which labels count, and how much; a soft target, as that of ``Sharpen``, replaces the class. For it a
            round is one step, and the pool one batch. The callback has a copy of its own. In the binary and multilabel
            tasks it is ``LabelThresholds``, in the regression task ``UncertaintyThreshold``. Default: None, which
            means that all are accepted.
        source: The network that labels. ``"student"``; ``"ema"``, its running average (of ``PseudoLabelModule``, or of
            Lightning's weight averaging); ``"teacher"``, the module's teacher or teachers; or
            :class:`GraphPseudoLabels` on the student's features.
        restart_student: Whether each refresh but the first resets the student to its first weights, with a new
            optimiser and schedule.
        warmup_epochs: Number of epochs without pseudo-labels before the first refresh, at least 0.
        num_views: Number of views of each sample in the regression task, at least 2. A cached teacher stores its
            outputs for all of them. Default: None, which means 5 in the regression task, and one under the evaluation
            transform in the others.

    Attributes:
        table: The labels in use, or None before the first refresh.
        report: The metrics of the last round, by the names above.

    Raises:
        InputError: If a value is out of range, the module or the datamodule lacks a needed part, there are no unlabeled
            samples, a class has no labeled sample (unless a teacher labels), or the pool is not that of the checkpoint.
            In the regression task, if the given labels of an output do not differ, or all views of a sample are equal.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        selection: Selection | None = None,
        source: Source = "student",
        restart_student: bool = False,
        warmup_epochs: int = 1,
        num_views: int | None = None,
    ) -> None:
        for name, number, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("warmup_epochs", warmup_epochs, 0),
            ("num_views", 2 if num_views is None else num_views, 2),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {number}")
        if not isinstance(source, GraphPseudoLabels) and source not in ("student", "ema", "teacher"):
            raise InputError(f"source must be student, ema, teacher or a GraphPseudoLabels, got {source!r}")
        self.every_n_epochs = every_n_epochs
        self._accepts_all = selection is None
        self.selection: Selection = FixedThreshold(0.0) if selection is None else deepcopy(selection)
        self.source = source
        self.restart_student = restart_student
        self.warmup_epochs = warmup_epochs
        self.num_views = num_views
        self.table: PoolLabels | None = None
        self.report: dict[str, float] = {}
        self._first_weights: dict[str, Tensor] | None = None
        self._task: PseudoLabelTask = MulticlassTask()  # until setup
        self._views: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Before a fit, clears the table and checks module and datamodule."""
        if stage != "fit":
            return
        require_whole_weights(trainer, "PseudoLabelRefresh")
        self.table = self._first_weights = None
        data: Any = getattr(trainer, "datamodule", None)
        missing = [name for name in ("pool_dataloader", "set_pseudo_labels") if not hasattr(data, name)]
        if missing:
            found = "no datamodule" if data is None else f"{type(data).__name__} without {' and '.join(missing)}"
            raise InputError(
                f"PseudoLabelRefresh needs a datamodule with pool_dataloader() and set_pseudo_labels(labels), as "
                f"SemiSupervisedDataModule has them, got {found}"
            )
        self._task = pseudo_label_task(getattr(pl_module, "task", "multiclass"), "PseudoLabelRefresh")
        if self._accepts_all:
            self.selection = self._task.accept_all()
        check_task(self.selection, self._task.name)
        self._views = self._task.number_of_views(self.num_views)
        if self._views and "num_views" not in signature(data.pool_dataloader).parameters:
            raise InputError(
                f"PseudoLabelRefresh: task: {self._task.name} needs a datamodule whose pool_dataloader(num_views) "
                f"gives random views, as that of SemiSupervisedDataModule, got {type(data).__name__}"
            )
        if not isinstance(self.source, str) and self._task.name != "multiclass":
            raise InputError(f"source: GraphPseudoLabels is for the multiclass task, got task: {self._task.name}")
        if (class_dim := getattr(pl_module, "class_dim", None)) is not None:
            raise InputError(
                f"PseudoLabelRefresh gives one pseudo-label a sample, got a module with class_dim: {class_dim}"
            )
        samples = unlabeled_samples(data)
        if samples is not None and not samples:
            raise InputError(_EMPTY)
        names = self._class_names(trainer)
        visible = _optional_method(data, "visible_labels")
        if visible:
            self._task.check_given(visible(), data, "PseudoLabelRefresh")
        if self.source == "teacher":
            find_teacher(pl_module)
        elif names is not None and visible:  # fail early
            self._task.check_labels(visible(), len(names), data, "PseudoLabelRefresh")
        set_up(self.selection, data, self._task.num_outputs or getattr(pl_module, "num_classes", None))
        momentum = max((one.momentum for one in self.selection.modules() if isinstance(one, RunningMean)), default=0.0)
        if momentum > 0.9:
            rank_zero_warn(
                f"PseudoLabelRefresh: a round is one step of {one_line(self.selection)}, whose averages hardly move "
                f"with a momentum of {momentum}; set momentum to 0, or near it"
            )
        if self.source == "ema":
            find_average(trainer, pl_module)
        if (self.restart_student or not isinstance(self.source, str)) and student_path(pl_module) is None:
            option = "restart_student" if self.restart_student else "GraphPseudoLabels"
            raise InputError(f"{option} needs a module with a student, {type(pl_module).__name__} has none")

    def state_dict(self) -> dict[str, Any]:
        """Return the table, the selection's state and the first weights of the student, for a checkpoint."""
        table = None if self.table is None else self.table.state_dict()
        selection = {name: value.clone() for name, value in self.selection.state_dict().items()}
        return {"table": table, "selection": selection, "first_weights": self._first_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the table, the selection's state and the first weights."""
        table = state_dict["table"]
        self.table = None if table is None else restore(table)
        self._first_weights = state_dict["first_weights"]
        check_fit(state_dict["selection"], self.selection.state_dict(), "selection: the checkpoint does not fit")
        self.selection.load_state_dict(state_dict["selection"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit. Fills the cache of a cached teacher, and stores the student's first weights."""
        if self.source == "teacher":
            teacher = find_teacher(pl_module)
            with validating(trainer):
                fill_caches(teacher, trainer, "pool_views", self._views)
        if self.restart_student and self._first_weights is None:
            state = student_of(pl_module).state_dict()
            self._first_weights = {name: value.detach().cpu().clone() for name, value in state.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of training. Passes a checkpoint's table to the datamodule, and refreshes it if it is due.

        A run resumed within an epoch calls no later hook of this callback before its first step.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.table is not None:
            if (samples := unlabeled_samples(data)) is not None:
                self._check_pool(torch.tensor(samples))
            data.set_pseudo_labels(self.table)
        self._refresh_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of each training epoch. Refreshes the labels if it is due."""
        self._refresh_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Writes a last round with the trained student's labels."""
        if self.table is None:
            return
        selection = deepcopy(self.selection)  # a run that is resumed goes on with the state of its last refresh
        labels, table = self._label_pool(trainer, pl_module, "student", selection)
        values = self._write_report(trainer, table, labels)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def last_refresh_epoch(self, epoch: int) -> int | None:
        """Return the last epoch up to ``epoch`` that starts with a refresh, or None before the first refresh.

        >>> [PseudoLabelRefresh(every_n_epochs=2, warmup_epochs=1).last_refresh_epoch(epoch) for epoch in range(5)]
        [None, 1, 1, 3, 3]
        """
        since = epoch - self.warmup_epochs
        return None if since < 0 else epoch - since % self.every_n_epochs

    def _refresh_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        epoch, max_epochs = trainer.current_epoch, trainer.max_epochs
        due = self.last_refresh_epoch(epoch)
        if due is None or (self.table is not None and self.table.epoch >= due):
            return
        if max_epochs is not None and -1 < max_epochs <= epoch:  # resumed after the last batch: no step is left
            return
        labels, self.table = self._label_pool(trainer, module, self.source, self.selection)
        trainer.datamodule.set_pseudo_labels(self.table)  # type: ignore[attr-defined]
        module.log_dict(self._write_report(trainer, self.table, labels), sync_dist=True)
        trains_with_these = getattr(module, "pseudo_labels", None) != "online"  # else the module warns of its own ones
        if trains_with_these and not self.table.accepted.any():
            rank_zero_warn(
                f"epoch {trainer.current_epoch}: none of {len(self.table.label)} pseudo-labels was accepted "
                f"({self._task.nearest(self.table)}, {one_line(self.selection)}); training uses the given labels alone "
                f"until the next refresh; {self._task.remedy}, or raise warmup_epochs"
            )
        elif trains_with_these and (text := self._task.collapse(self.table, labels)):
            rank_zero_warn(f"epoch {trainer.current_epoch}: {text} ({one_line(self.selection)})")
        if self.restart_student and self.table.round > 0:
            self._restart(trainer, module)

    def _restart(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._first_weights is not None
        student_of(module).load_state_dict(self._first_weights)
        for averaged in (getattr(module, "ema", None), getattr(weight_averaging(trainer), "_average_model", None)):
            if isinstance(averaged, AveragedModel):
                averaged.n_averaged.zero_()  # the next step starts a new average
        for parameter in module.parameters():
            parameter.grad = None
        trainer.strategy.setup_optimizers(trainer)
        rank_zero_info(f"epoch {trainer.current_epoch}: the student restarts, on new pseudo-labels")

    # Prediction.

    def _label_pool(
        self, trainer: Trainer, module: LightningModule, source: Source, selection: Selection
    ) -> tuple[Tensor, PoolLabels]:
        """Return the given labels and a new table, which is the same on all processes."""
        pool = predict_pool(trainer, module, source, self._task, self._views)
        unlabeled = None if pool is None else self._task.unknown(pool.y).any(dim=1)
        if pool is None or unlabeled is None or not unlabeled.any():
            raise InputError(_EMPTY)
        if self.source != "teacher":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._task.check_labels(pool.y, pool.outputs, data, "PseudoLabelRefresh")
        self._check_pool(pool.index[unlabeled])
        predictions = pool.predictions
        if not isinstance(source, str):
            predictions = trainer.strategy.broadcast(
                source(predictions, pool.y, pool.outputs) if trainer.is_global_zero else predictions[:0]
            )

        def select(*rows: Tensor) -> tuple[Tensor, Tensor]:
            with alone():  # the first process has all rows already
                own: Any = selection(*rows) if trainer.is_global_zero else None
            (target, weight), state = trainer.strategy.broadcast((own, selection.state_dict()))
            selection.load_state_dict(state)
            if pool.varied is not None:  # predictions of equal views agree whatever the sample is
                varied = pool.varied[torch.searchsorted(pool.index, rows[2])]
                weight = weight * varied.view(-1, *[1] * (weight.ndim - 1))
            return target, weight

        parts = pool.index, pool.y, predictions, select
        table, labels = self._task.make_round(*parts, self.table, trainer.current_epoch)
        if trainer.strategy.broadcast(table.hash) != table.hash:
            raise InputError(f"rank {trainer.global_rank} has other pseudo-labels than rank 0: is its data the same?")
        return labels, table

    def _check_pool(self, index: Tensor) -> None:
        before = None if self.table is None else torch.unique(self.table.index)
        if before is not None and not torch.equal(before, index.sort().values):
            raise InputError(
                f"the unlabeled pool has changed since its last labels: then {len(before)} samples, now "
                f"{len(index)}; resume with the data and the split.json of that run, or start a new run"
            )

    @staticmethod
    def _class_names(trainer: Trainer) -> list[str] | None:
        names: list[str] | None = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        return names

    # Report.

    def _write_report(self, trainer: Trainer, table: PoolLabels, labels: Tensor) -> dict[str, float]:
        """Write the round's CSV file and figures, and return its metrics by their logged names."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder = run_folder(trainer)
        if writes_files(trainer):
            path_of = _optional_method(data, "path") or (lambda index: None)
            content_of = _optional_method(data, "content") or (lambda index: "")
            with only_warn(f"pseudo-labels of round {table.round}"):
                self._task.write(folder, table, self._class_names(trainer), path_of, content_of)
            for name, draw in self._task.figures(table, labels, self.selection).items():
                log_figure(trainer, f"pseudo_labels/{name}", draw)
        self.report = self._task.metrics(table, labels, _optional_method(data, "hidden_truth"))
        return {f"pseudo_labels/{name}": value for name, value in self.report.items()}


def _optional_method(data: Any, name: str) -> Any:
    """Return a datamodule's method, or None. An attribute that is not callable counts as missing."""
    found = getattr(data, name, None)
    return found if callable(found) else None


_EMPTY = (
    "PseudoLabelRefresh: there are no unlabeled samples; set labeled to a part of the labels, or unlabeled to rest, "
    "source or test"
)
