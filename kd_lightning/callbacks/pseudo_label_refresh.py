"""Label the unlabeled pool anew between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_lightning.batch import IGNORE_INDEX, Batch
from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.pseudo_labels.report import figures, measure
from kd_lightning.pseudo_labels.table import PseudoLabels, check_classes, check_threshold, choose, write_round
from kd_lightning.teachers.cache_fill import keep_outputs
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.teacher import Teacher

Source = Literal["student", "ema", "teacher"] | GraphPseudoLabels


class PseudoLabelRefresh(Callback):
    """Every so many epochs predict the whole unlabeled pool, and hand the accepted labels to the datamodule.

    Predictions are made in eval mode under evaluation transforms, at the start of an epoch. Acceptance is never
    permanent: each round replaces the one before. The label of a sample whose superclass is known lies in it (not that
    of a graph). Several processes predict a share each, and end with the same table.
    Works on any LightningModule of the multiclass task whose ``forward`` gives logits, and any datamodule with the two
    methods of :class:`~kd_lightning.pseudo_labels.PseudoLabelStore`. ``PseudoLabelModule(pseudo_labels="refreshed")`` learns
    the labels in a term of their own; the other modules take accepted ones for labels (of soft ones, the most probable
    class); ``PseudoLabelModule(pseudo_labels="online")`` leaves them alone, so that here they only show how its own are.

    Each round leaves a CSV file in the run's folder ``pseudo_labels/`` (a row a sample; ``python -m kd_lightning
    labels RUN`` reads them); the last one, when training ends, is the trained student's, whatever the source, and is
    what ``predict`` gives. The table is in the checkpoint. Charts ``pseudo_labels/``
    ``coverage`` (accepted share), ``confidence`` (mean), ``flips`` (share that changed since the round before) and
    ``class_distance`` (total variation distance of the accepted labels' classes from the given ones'); and where the
    datamodule has ``hidden_truth(index)``, ``precision`` over all and ``accepted_precision``. Figures: confidences
    with the threshold, and classes.

    Args:
        every_n_epochs: From one refresh to the next.
        threshold: Accept labels of at least this probability, in (0, 1]; None: all.
        top_k_per_class: Of these, accept the k most probable of each class; None: all.
        soft: Hand out probabilities, not only labels.
        sharpen: Temperature of the soft labels, in (0, 1]: p^(1/T), scaled to sum 1.
        source: Who labels: the ``"student"``; its running average, ``"ema"`` (of ``PseudoLabelModule``, or of
            Lightning's weight averaging); the module's ``"teacher"`` or teachers; or :class:`GraphPseudoLabels` on the
            student's features.
        restart_student: At each refresh but the first, put the student back to its first weights, with a new optimiser
            and schedule.
        warmup_epochs: Epochs on the labels alone before the first refresh.

    Attributes:
        table: The labels in use; None before the first refresh.
        report: What the last round measured, by the names above.

    Raises:
        InputError: For values out of range, a module or datamodule that lacks what is needed, no unlabeled samples, a
            class without a labeled sample (unless a teacher labels), and a pool that is not the checkpoint's.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        threshold: float | None = None,
        top_k_per_class: int | None = None,
        soft: bool = False,
        sharpen: float = 1.0,
        source: Source = "student",
        restart_student: bool = False,
        warmup_epochs: int = 1,
    ) -> None:
        check_threshold(threshold)
        for name, number, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("top_k_per_class", 1 if top_k_per_class is None else top_k_per_class, 1),
            ("warmup_epochs", warmup_epochs, 0),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {number}")
        if not 0.0 < sharpen <= 1.0:
            raise InputError(f"sharpen is a temperature in (0, 1], got {sharpen}")
        if not isinstance(source, GraphPseudoLabels) and source not in ("student", "ema", "teacher"):
            raise InputError(f"source must be student, ema, teacher or a GraphPseudoLabels, got {source!r}")
        self.every_n_epochs = every_n_epochs
        self.threshold = threshold
        self.top_k_per_class = top_k_per_class
        self.soft = soft
        self.sharpen = sharpen
        self.source = source
        self.restart_student = restart_student
        self.warmup_epochs = warmup_epochs
        self.table: PseudoLabels | None = None
        self.report: dict[str, float] = {}
        self._first_weights: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew, and check that all parts are there."""
        if stage != "fit":
            return
        self.table = self._first_weights = None
        data: Any = getattr(trainer, "datamodule", None)
        lacking = [name for name in ("pool_dataloader", "set_pseudo_labels") if not hasattr(data, name)]
        if lacking:
            named = "no datamodule" if data is None else f"{type(data).__name__} without {' and '.join(lacking)}"
            raise InputError(
                f"PseudoLabelRefresh needs a datamodule with pool_dataloader() and set_pseudo_labels(labels), as "
                f"SemiSupervisedDataModule has them, got {named}"
            )
        if (indices := _method(data, "unlabeled_indices")) and not len(indices()):
            raise InputError(_EMPTY)
        task = getattr(pl_module, "task", "multiclass")
        if task != "multiclass":
            raise InputError(f"PseudoLabelRefresh is for the multiclass task, where a label is one class, got {task}")
        names = self._class_names(trainer)
        if self.source == "teacher":
            self._teacher(pl_module)
        elif names is not None and (visible := _method(data, "visible_labels")):  # sooner than the first refresh
            check_classes(visible(), len(names), names, "PseudoLabelRefresh")
        if self.source == "ema":
            self._average(trainer, pl_module)
        needs_student = self.restart_student or not isinstance(self.source, str)
        if needs_student and not isinstance(getattr(pl_module, "student", None), nn.Module):
            what = "restart_student" if self.restart_student else "GraphPseudoLabels"
            raise InputError(f"{what} needs a module with a student, {type(pl_module).__name__} has none")

    def state_dict(self) -> dict[str, Any]:
        """The table, and what restarts begin with."""
        table = None if self.table is None else self.table.state_dict()
        return {"table": table, "first_weights": self._first_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that table."""
        table = state_dict["table"]
        self.table = None if table is None else PseudoLabels(**table)
        self._first_weights = state_dict["first_weights"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the first weights, where they will be needed again; fill the cache of a teacher that has one."""
        if self.source == "teacher":
            teacher = self._teacher(pl_module)
            with _validating(trainer):
                keep_outputs([one for one in teacher.modules() if isinstance(one, Teacher)], trainer, "pool_views")
        if self.restart_student and self._first_weights is None:
            student: nn.Module = pl_module.student  # type: ignore[assignment]
            self._first_weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand out a checkpoint's table; a run that goes on may get no other call before its first step."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.table is not None:
            if indices := _method(data, "unlabeled_indices"):
                self._check_pool(torch.as_tensor(indices()))
            data.set_pseudo_labels(self.table)
        self._refresh_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh when it is time."""
        self._refresh_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down what the trained student says of the pool, whoever has taught it; ``predict`` says the same."""
        if self.table is None:
            return
        given, table = self._label(trainer, pl_module, "student")
        values = self._report(trainer, table, given)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def last_due(self, epoch: int) -> int | None:
        """The last epoch up to this one that begins with a refresh; None before the first.

        >>> [PseudoLabelRefresh(every_n_epochs=2, warmup_epochs=1).last_due(epoch) for epoch in range(5)]
        [None, 1, 1, 3, 3]
        """
        since = epoch - self.warmup_epochs
        return None if since < 0 else epoch - since % self.every_n_epochs

    def _refresh_if_due(self, trainer: Trainer, module: LightningModule) -> None:
        epoch, last = trainer.current_epoch, trainer.max_epochs
        due = self.last_due(epoch)
        if due is None or (self.table is not None and self.table.epoch >= due):
            return
        if last is not None and -1 < last <= epoch:  # resumed from the very last batch: nothing is left to learn
            return
        given, self.table = self._label(trainer, module, self.source)
        trainer.datamodule.set_pseudo_labels(self.table)  # type: ignore[attr-defined]
        module.log_dict(self._report(trainer, self.table, given), sync_dist=True)
        if not self.table.accepted.any():
            rank_zero_warn(
                f"epoch {trainer.current_epoch}: none of {len(self.table.label)} pseudo-labels was accepted (the "
                f"highest probability is {self.table.confidence.max():.3f}, threshold {self.threshold}); until the "
                f"next refresh only the labels are learned; lower the threshold, set top_k_per_class alone, or "
                f"lengthen warmup_epochs"
            )
        if self.restart_student and self.table.round > 0:
            self._restart(trainer, module)

    def _restart(self, trainer: Trainer, module: LightningModule) -> None:
        student: nn.Module = module.student  # type: ignore[assignment]
        assert self._first_weights is not None
        student.load_state_dict(self._first_weights)
        for averaged in (getattr(module, "ema", None), getattr(_weight_averaging(trainer), "_average_model", None)):
            if isinstance(averaged, AveragedModel):
                averaged.n_averaged.zero_()  # the next step starts it again
        for parameter in module.parameters():
            parameter.grad = None
        trainer.strategy.setup_optimizers(trainer)
        rank_zero_info(f"epoch {trainer.current_epoch}: the student starts again, on new pseudo-labels")

    # Labelling.

    def _label(self, trainer: Trainer, module: LightningModule, source: Source) -> tuple[Tensor, PseudoLabels]:
        """The given labels, and a new table: the same on all processes."""
        index, y, answers, classes = self._predict(trainer, module, source)
        unlabeled = y == IGNORE_INDEX
        if not unlabeled.any():
            raise InputError(_EMPTY)
        if self.source != "teacher":
            check_classes(y, classes, self._class_names(trainer), "PseudoLabelRefresh")
        self._check_pool(index[unlabeled])
        if not isinstance(source, str):
            features = answers
            answers = trainer.strategy.broadcast(
                source(features, y, classes) if trainer.is_global_zero else features[:0]
            )
        table = choose(
            answers[unlabeled],
            index[unlabeled],
            threshold=self.threshold,
            top_k_per_class=self.top_k_per_class,
            soft=self.soft,
            sharpen=self.sharpen,
            before=self.table,
            epoch=trainer.current_epoch,
        )
        if trainer.strategy.broadcast(table.hash) != table.hash:
            raise InputError(f"rank {trainer.global_rank} has other pseudo-labels than rank 0: is its data the same?")
        return y[~unlabeled], table

    def _predict(self, trainer: Trainer, module: LightningModule, source: Source) -> tuple[Tensor, Tensor, Tensor, int]:
        """Index (N,), given label (N,), probabilities (N, C) or features (N, D), of all processes by index; and C."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        classes = 0
        # a loader draws a seed for its workers, which must not move the training's own draws
        with isolate_rng(include_cuda=False), torch.no_grad(), evaluating(module), _validating(trainer):
            for given in trainer.datamodule.pool_dataloader():  # type: ignore[attr-defined]
                batch = Batch.from_any(given)
                if batch.index is None or batch.y is None:
                    raise InputError("pool_dataloader must give Batches with index and y (-100 where unlabeled)")
                batch = trainer.strategy.batch_to_device(batch)
                batch.x = trainer.precision_plugin.convert_input(batch.x)
                with trainer.precision_plugin.forward_context():
                    answer = self._answer(trainer, module, batch, source)
                    if not classes:
                        plain = isinstance(source, str)
                        classes = answer.shape[1] if plain else logits_of(module(batch.x), "the student").shape[-1]
                parts.append((batch.index.cpu(), batch.y.cpu(), answer.float().cpu()))
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, (parts, classes))
            parts = [part for share, _ in gathered for part in share]
            classes = max(number for _, number in gathered)  # a rank without a share has seen none
        if not parts:
            raise InputError(_EMPTY)
        index, y, answers = (torch.cat(column) for column in zip(*parts, strict=True))
        if not answers.isfinite().all():
            bad = int(index[~answers.isfinite().all(dim=1)][0])
            who = source if isinstance(source, str) else "student"
            raise InputError(f"pseudo-labels: what the {who} says of sample {bad} is no number")
        order = index.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]  # shares are filled up with repeats
        order = order[first]
        return index[order], y[order].long(), answers[order], classes

    def _answer(self, trainer: Trainer, module: LightningModule, batch: Batch, source: Source) -> Tensor:
        if not isinstance(source, str):
            return source.features_of(module.student, batch.x)  # type: ignore[arg-type]
        if source == "student":
            logits = logits_of(module(batch.x), "the student")
        elif source == "ema":
            logits = logits_of(self._average(trainer, module).eval()(batch.x), "the averaged student")
        else:
            teacher = self._teacher(module)
            if isinstance(teacher, Ensemble):
                logits = teacher.pool(teacher(batch))
            else:
                given = batch if isinstance(teacher, Teacher) else batch.x
                logits = logits_of(teacher.eval()(given), "the teacher")
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(f"pseudo-labels need logits (B, C) of at least two classes, got {[*logits.shape]}")
        return mask_candidates(logits.float(), batch.candidates).softmax(dim=1)

    def _teacher(self, module: LightningModule) -> nn.Module:
        for name in ("teacher", "ensemble"):
            if isinstance(found := getattr(module, name, None), nn.Module):
                return found
        raise InputError(f"source: teacher, but {type(module).__name__} has no teacher")

    def _average(self, trainer: Trainer, module: LightningModule) -> nn.Module:
        if isinstance(found := getattr(module, "ema", None), nn.Module):
            return found
        averaging = _weight_averaging(trainer)
        if averaging is None:
            raise InputError(
                "source: ema needs PseudoLabelModule(ema_decay=...), or Lightning's EMAWeightAveraging as a callback"
            )
        return averaging._average_model or module  # none before its own setup

    def _check_pool(self, index: Tensor) -> None:
        if self.table is not None and not torch.equal(self.table.index, index.sort().values):
            raise InputError(
                f"the unlabeled pool has changed since its last labels: then {len(self.table.index)} samples, now "
                f"{len(index)}; resume with the data and the split.json of that run, or start anew"
            )

    @staticmethod
    def _class_names(trainer: Trainer) -> list[str] | None:
        names: list[str] | None = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        return names

    # Telling.

    def _report(self, trainer: Trainer, table: PseudoLabels, given: Tensor) -> dict[str, float]:
        """Write the ledger's round and the figures; the numbers."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        known = _method(data, "hidden_truth")
        truth = known(table.index) if known else None
        folder = trainer.log_dir or trainer.default_root_dir  # asks all processes
        leaves = trainer.loggers or trainer.checkpoint_callbacks
        if trainer.is_global_zero and leaves and not getattr(trainer, "fast_dev_run", False):
            write_round(Path(folder), table, self._class_names(trainer), _method(data, "path") or (lambda index: None))
            boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
            for name, figure in figures(table, given, self.threshold).items() if boards else ():
                for board in boards:
                    board.experiment.add_figure(f"pseudo_labels/{name}", figure, trainer.global_step)
        self.report = measure(table, given, truth)
        return {f"pseudo_labels/{name}": value for name, value in self.report.items()}


def _method(data: Any, name: str) -> Any:
    """A datamodule's method, where it has it; somebody else's may have an attribute of that name."""
    found = getattr(data, name, None)
    return found if callable(found) else None


def _weight_averaging(trainer: Trainer) -> WeightAveraging | None:
    return next((c for c in getattr(trainer, "callbacks", ()) if isinstance(c, WeightAveraging)), None)


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    """Hooks that augment a batch on the device look at the trainer's stage, not at the module's mode."""
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True


_EMPTY = (
    "PseudoLabelRefresh: there are no unlabeled samples to label; set labeled to a part of the labels, or unlabeled to "
    "rest, source or test"
)
