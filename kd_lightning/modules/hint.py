"""FitNets: hints first, then distillation."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam
from torchmetrics import MeanMetric

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, evaluating
from kd_lightning.features.projectors import Projectors, first_line
from kd_lightning.losses import HintLoss
from kd_lightning.losses.base import Task, check_weight
from kd_lightning.modules._shared.first_inputs import first_images
from kd_lightning.modules._shared.hint_figure import hint_figure
from kd_lightning.modules._shared.stage_callbacks import forget_best, hold_early_stopping
from kd_lightning.modules.distill import DistillModule
from kd_lightning.modules.supervised import LossTerm

EXAMPLES = 4  # images for the dry pass and the figures


class HintModule(DistillModule):
    """Train a thin, deep student in two stages within one fit (FitNets, Romero et al. 2014).

    Stage 1, ``hint_epochs`` long: the guided layers of the student learn to answer the teacher's hint layers, through
    projectors, by :class:`~kd_lightning.losses.HintLoss`. Only the student up to its deepest guided layer and the
    projectors train; what lies above is not even computed. Stage 2: :class:`DistillModule`'s objective for the whole
    student, with a new optimiser and scheduler. ``SoftWeightAnnealing`` counts its epochs from there.

    Charts what :class:`DistillModule` does, and ``stage`` (1 or 2), ``train/hint`` (the sum over the pairs),
    ``train/hint/<guided>``, the same for ``val``, ``projector_parameters``, and at the end of each stage a figure of
    hint maps above the student's. ``val/hint`` pools several loaders, and runs the teacher up to its hints each time.
    In stage 1 ``EarlyStopping`` is held; what a ``ModelCheckpoint`` found best there is forgotten at its end.

    A resume is exact in either stage and at the boundary; only ``hint_patience`` misses the validation that Lightning
    leaves out after a checkpoint of an epoch's last step.

    Args:
        student: The network to train, see :class:`SupervisedModule`.
        teacher: The trained network, or a ``Teacher`` around it; None for ``test`` and ``predict`` alone.
        hints: For each guided layer of the student the teacher's hint layer, by dotted path. Theirs must be tensors:
            maps (B, C, H, W), tokens (B, N, C) or vectors (B, C); maps (B, H, W, C), as Swin's, need a projector of
            their own. ``python -m kd_lightning layers`` lists them.
        hint_epochs: Length of stage 1; 0 is plain distillation.
        hint_optimizer: Of stage 1, takes the parameters. None: ``optimizer``.
        hint_lr_scheduler: Of stage 1, takes the optimiser; ReduceLROnPlateau follows ``val/hint``. None: a constant
            learning rate.
        hint_patience: Stage 1 ends earlier after so many validations without a lower ``val/hint``.
        hint_weight: Above 0 the hint term stays on in stage 2, with this weight: one joint stage where ``hint_epochs``
            is 0, as most libraries have it. The paper found that this fails on thin deep students. The term sums over
            all entries of a map: a weight of about 1 over their number puts it beside the others.
        projectors: By guided layer, from its output to the hint's shape; the others are built, see
            :func:`~kd_lightning.features.projectors.build_projector`. They are trained, and are no part of the deployed student.
        input_shape: Of one sample, to build the projectors from. None: they are built from the first training images
            when the fit begins.
        soft_loss: See :class:`DistillModule`, as for all that follow.
        soft_weight: w in [0, 1]; FitNets' lambda 4 to 1 at temperature 3 is 0.31 to 0.10.
        task: See :class:`SupervisedModule`.
        hard_loss: Called as ``(logits, target)``.
        optimizer: Of stage 2, takes the parameters.
        lr_scheduler: Of stage 2, takes the optimiser.
        lr_interval: ``"epoch"`` or ``"step"``.

    Raises:
        InputError: For no hints, a layer that a network does not have or never reaches, shapes that no built-in
            projector joins, a projector of another output shape, ``hint_epochs`` that leave no epoch for stage 2, and
            what :class:`DistillModule` refuses.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        hints: dict[str, str],
        hint_epochs: int,
        *,
        hint_optimizer: OptimizerCallable | None = None,
        hint_lr_scheduler: LRSchedulerCallable | None = None,
        hint_patience: int | None = None,
        hint_weight: float = 0.0,
        projectors: dict[str, nn.Module] | None = None,
        input_shape: list[int] | None = None,
        soft_loss: nn.Module | None = None,
        soft_weight: float = 0.9,
        task: Task = "multiclass",
        hard_loss: nn.Module | None = None,
        optimizer: OptimizerCallable = Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
    ) -> None:
        super().__init__(
            student,
            teacher,
            soft_loss=soft_loss,
            soft_weight=soft_weight,
            task=task,
            hard_loss=hard_loss,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
        )
        for name, number, least in (("hint_epochs", hint_epochs, 0), ("hint_patience", hint_patience, 1)):
            if number is not None and number < least:
                raise InputError(f"{name} must be at least {least}, got {number}")
        check_weight("hint_weight", hint_weight)
        if hint_weight > 0 and self.teacher is not None and self.teacher.cache is not None:
            raise InputError("hint_weight: hints of every step need the teacher itself; leave out its cache")
        self.save_hyperparameters("hints", "hint_epochs", "hint_patience", "hint_weight", "input_shape")
        self.projectors = Projectors(hints, projectors)
        self.hint_epochs = hint_epochs
        self.hint_optimizer = hint_optimizer
        self.hint_lr_scheduler = hint_lr_scheduler
        self.hint_patience = hint_patience
        self.hint_weight = hint_weight
        self.hint_loss = HintLoss()
        self._joint = hint_weight > 0
        self._hinting = self._joint or hint_epochs > 0  # else it is plain distillation
        self._examples: Tensor | None = None
        self._held: list[nn.Module] = []  # BatchNorm layers above the guided ones
        self._means: dict[str, MeanMetric] = {}
        self._start_over()
        if input_shape is not None:
            self._measure(torch.randn(EXAMPLES, *input_shape, generator=torch.Generator().manual_seed(0)))

    def _start_over(self) -> None:
        self.distilling = self.hint_epochs == 0
        self.distill_from_epoch = self.hint_epochs  # where stage 2 begins, as far as is known
        self._best, self._waited = math.inf, 0

    def _measure(self, x: Tensor) -> None:
        """Build the projectors from inputs (B, ...)."""
        if self.teacher is None or not self._hinting:
            return
        try:
            x = x.to(self.device)
            with torch.no_grad():
                teacher_x = self.teacher.prepare(x)
            self.projectors.measure(self.student, x, self.teacher.network, teacher_x)
        except RuntimeError as error:
            reason = f"the networks cannot take inputs of shape {[*x.shape]}: {first_line(error)}"
            raise InputError(f"hints: {reason}") from error

    # The objective.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The hint term in stage 1, the hard and the soft one in stage 2, all three in joint training."""
        if self.teacher is None:
            raise InputError("training needs the teacher; teacher=None is for test and predict alone")
        if not self.projectors.joins:
            self._measure(batch.x)
        if not self.distilling:
            hints = self._hints(batch)  # before the student's activations are held
            with capture(self.student, [*self.projectors.hints], stop=True) as guided:
                self(batch.x)
            value = self._hint_term(guided, hints, len(batch))
            return {"hint": LossTerm(1.0, self._reaching_all(value))}
        if self._joint:
            layers = [*self.projectors.hints.values()]
            with (
                capture(self.student, [*self.projectors.hints]) as guided,
                capture(self.teacher.network, layers) as hints,
            ):
                terms = super().losses(batch)
            return terms | {"hint": LossTerm(self.hint_weight, self._hint_term(guided, hints, len(batch)))}
        terms = super().losses(batch)
        weight, value = terms["soft"]
        return terms | {"soft": LossTerm(weight, self._reaching_all(value))}

    def _hints(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's hints; what lies above is not computed."""
        assert self.teacher is not None
        with capture(self.teacher.network, [*self.projectors.hints.values()], stop=True) as hints:
            self.teacher.compute(batch)
        return hints

    def _hint_term(self, guided: dict[str, Tensor], hints: dict[str, Tensor], rows: int) -> Tensor:
        values = self._distances(guided, hints)
        if self._trainer is not None and self.trainer.training:
            for name, value in values.items():
                self._log_epoch(f"train/hint/{name}", value, rows)
        return torch.stack([*values.values()]).sum()

    def _distances(self, guided: dict[str, Tensor], hints: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.hint_loss(*pair) for name, pair in self.projectors.pairs(guided, hints).items()}

    def _trained(self) -> list[nn.Parameter]:
        """What the current stage trains."""
        if self.distilling:
            return [p for name, p in self.named_parameters() if self._joint or not name.startswith("projectors.")]
        below = [p for name, p in self.student.named_parameters() if name in self.projectors.below]
        return [*below, *self.projectors.parameters()]

    def _reaching_all(self, value: Tensor) -> Tensor:
        """Under DDP, which waits for a gradient of every parameter: those that do not train get zeros."""
        if self._trainer is None or not isinstance(self.trainer.strategy, DDPStrategy):
            return value
        reached = {id(p) for p in self._trained()}
        rest = [(p * 0).sum().to(value.dtype) for p in self.parameters() if p.requires_grad and id(p) not in reached]
        return torch.stack([value, *rest]).sum()

    # The run.

    def setup(self, stage: str) -> None:
        """Check the stages' lengths, and start with the first."""
        super().setup(stage)
        self._means.clear()
        if stage != TrainerFn.FITTING:
            return
        self._release()  # of a fit that a fault ended
        self._start_over()
        for callback in self.trainer.early_stopping_callbacks:
            monitor = str(getattr(callback, "monitor", ""))
            if "/hint" in monitor and not self._joint:
                raise InputError(f"EarlyStopping on {monitor} would end the run: hint_patience ends stage 1")
        hold_early_stopping(self.trainer.early_stopping_callbacks, lambda: not self.distilling)
        last = self.trainer.max_epochs
        if last is not None and 0 <= last <= self.hint_epochs and not getattr(self.trainer, "fast_dev_run", False):
            raise InputError(
                f"hint_epochs must be below max_epochs, {last}, so that stage 2 runs, got {self.hint_epochs}"
            )

    def configure_model(self) -> None:
        """Build the projectors, now that the data are at hand."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fitting or not self._hinting or self.projectors.below:
            return
        try:
            self._examples = first_images(self, EXAMPLES)
        except Exception as error:
            reason = f"cannot look at the first training images ({first_line(error)}); give input_shape"
            raise InputError(f"hints: {reason}") from error
        self._measure(self._examples)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The current stage's optimiser and scheduler, over what it trains."""
        if self.distilling:
            return self.optimization(self._trained(), self.optimizer, self.lr_scheduler)
        trained = self._trained()
        if not self.projectors.below or not any(p.requires_grad for p in trained[: len(self.projectors.below)]):
            reason = "hints: nothing below the guided layers requires a gradient"
            if not self.projectors.below:
                reason = "the projectors are not built yet: give input_shape, or leave it to Trainer.fit"
            raise InputError(reason)
        optimizer = self.hint_optimizer or self.optimizer
        return self.optimization(trained, optimizer, self.hint_lr_scheduler, monitor="val/hint")

    def on_train_start(self) -> None:
        """Tell what was built, and begin; a run that goes on in an epoch has no other call before its first step."""
        if self.projectors.joins:
            rank_zero_info(self.projectors.describe())
        if self.hint_patience is not None and not self.trainer.enable_validation:
            raise InputError("hint_patience needs validation data, whose hint loss it watches")
        self._enter_stage()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep a few images for the figures."""
        if self._examples is None and self._hinting:
            self._examples = Batch.from_any(batch).x[:EXAMPLES].detach()

    def on_train_epoch_start(self) -> None:
        """Go over to stage 2 when it is time."""
        self._enter_stage()
        self.log("stage", 2.0 if self.distilling else 1.0)
        if self.projectors:
            self.log("projector_parameters", float(self.projectors.size()))

    def _enter_stage(self) -> None:
        if self.distilling:
            return
        if self.trainer.current_epoch < self.distill_from_epoch:
            self._hold()
            return
        self._show("stage_1")
        self._release()
        self.distilling = True
        forget_best(self.trainer.checkpoint_callbacks)
        for parameter in self.parameters():
            parameter.grad = None
        self.trainer.strategy.setup_optimizers(self.trainer)
        rank_zero_info(f"epoch {self.trainer.current_epoch}: stage 2 begins, with a new optimiser")

    def _hold(self) -> None:
        """In stage 1 keep the statistics of BatchNorm above the guided layers, should its forward run at all."""
        if self._held:
            return
        for name, layer in self.student.named_modules():
            own = [f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False)]
            if isinstance(layer, _BatchNorm) and layer.training and own and not self.projectors.below.intersection(own):
                self._held.append(layer.eval())

    def _release(self) -> None:
        for layer in self._held:
            layer.train()
        self._held.clear()

    def on_train_end(self) -> None:
        """Show the last maps, and say so where stage 2 was never reached."""
        super().on_train_end()
        self._release()
        self._show("stage_2" if self.distilling else "stage_1")
        if not self.distilling:
            rank_zero_warn("the run ended in stage 1: the student above its guided layers is untrained")

    def _show(self, stage: str) -> None:
        """A figure of each pair, where the logger takes figures."""
        boards = [logger for logger in self.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or self._examples is None or not self.trainer.is_global_zero:
            return
        precision = self.trainer.precision_plugin
        batch = Batch(precision.convert_input(self._examples.to(self.device)))
        with torch.no_grad(), evaluating(self.student), evaluating(self.projectors), precision.forward_context():
            with capture(self.student, [*self.projectors.hints], stop=True) as guided:
                self(batch.x)
            pairs = self.projectors.pairs(guided, self._hints(batch))
        for name, (regressed, hint) in pairs.items():
            figure = hint_figure(hint, regressed, f"{name} -> {self.projectors.hints[name]}")
            for board in boards:
                board.experiment.add_figure(f"hints/{name}/{stage}", figure, self.global_step)
            plt.close(figure)

    # Validation: the hint loss, and the end of stage 1 by it.

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fitting or (self.distilling and not self._joint):
            super()._evaluate(stage, batch, batch_idx, dataloader_idx)
            return
        batch = Batch.from_any(batch)
        with capture(self.student, [*self.projectors.hints]) as guided:
            super()._evaluate(stage, batch, batch_idx, dataloader_idx)
        values = {f"val/hint/{name}": value for name, value in self._distances(guided, self._hints(batch)).items()}
        for name, value in {"val/hint": torch.stack([*values.values()]).sum(), **values}.items():
            if name not in self._means:
                self._means[name] = MeanMetric().to(value.device)
            self._means[name].update(value, len(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the figures, and end stage 1 where its loss falls no more."""
        super().on_validation_epoch_end()
        values = {name: mean.compute() for name, mean in self._means.items()}
        self._means.clear()
        self.log_dict(values, sync_dist=True)
        if self.distilling or self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        loss = float(values.get("val/hint", math.nan))
        self._best, self._waited = (loss, 0) if loss < self._best else (self._best, self._waited + 1)
        if self.hint_patience is not None and self._waited >= self.hint_patience:
            self.distill_from_epoch = min(self.distill_from_epoch, self.trainer.current_epoch + 1)

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the stage, and the shapes that projectors are built from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hints"] = {
            "pairs": self.projectors.hints,
            "joins": self.projectors.joins,
            "distilling": self.distilling,
            "distill_from_epoch": self.distill_from_epoch if self._settled else None,
            "best": self._best,
            "waited": self._waited,
        }

    @property
    def _settled(self) -> bool:
        """Whether the end of stage 1 is more than a setting."""
        return self.distilling or self.distill_from_epoch != self.hint_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the checkpoint's stage, with its projectors."""
        if (saved := checkpoint.get("hints")) is not None:
            if saved["pairs"] != self.projectors.hints:
                raise InputError(
                    f"hints: the checkpoint was trained with {saved['pairs']}, got {self.projectors.hints}"
                )
            if saved["joins"]:
                self.projectors.build(saved["joins"], self.device, torch.float32)
            self.distilling = saved["distilling"]
            self._best, self._waited = saved["best"], saved["waited"]
            if saved["distill_from_epoch"] is not None:
                self.distill_from_epoch = saved["distill_from_epoch"]
        super().on_load_checkpoint(checkpoint)
