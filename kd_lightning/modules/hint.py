"""FitNets: hints first, then distillation."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, evaluating
from kd_lightning.features.term import FeatureTerm
from kd_lightning.losses import HintLoss
from kd_lightning.losses.base import check_weight
from kd_lightning.modules._shared.feature_terms import SAMPLES, Captured, sum_of
from kd_lightning.modules._shared.first_inputs import first_rows, run_once
from kd_lightning.modules._shared.frozen_statistics import batch_norms_without, frozen_statistics
from kd_lightning.modules._shared.hint_figure import hint_figure
from kd_lightning.modules._shared.loss_terms import LossTerm, SampleTerm
from kd_lightning.modules._shared.optimizers import build_optimizer, build_optimizers
from kd_lightning.modules._shared.schedules import check_schedule, check_schedules
from kd_lightning.modules._shared.stage_callbacks import check_monitors, pause_early_stopping, reset_best
from kd_lightning.modules._shared.stage_gradients import check_first_gradients, with_all_gradients
from kd_lightning.modules.distill import DistillModule
from kd_lightning.runs.figures.log_figure import log_figure


class HintModule(DistillModule):
    """Train a thin, deep student in two stages within one fit (FitNets, Romero et al. 2014).

    Stage 1 takes ``hint_epochs``. The guided layers of the student learn to match the teacher's hint layers, through
    projectors, by a :class:`~kd_lightning.FeatureTerm` named ``hint``. Only the projectors and the student up to its
    deepest guided layer train; the layers above are not computed. Stage 2 trains the whole student on
    :class:`DistillModule`'s objective, with a new optimiser and scheduler (``optimizer`` and ``lr_scheduler``).
    ``SoftWeightAnnealing`` and the warm-up of other feature terms count their epochs from the start of stage 2.
    FitNets' lambda of 4 to 1 at temperature 3 is a ``soft_weight`` of 0.31 to 0.10.

    Logs what :class:`DistillModule` does, and ``stage`` (1 or 2), ``train/hint`` (the sum over the pairs; of several
    pairs also ``train/hint/<guided>``), the same for ``val``, ``projector_parameters``, and at the end of each stage a
    figure of hint maps above the student's. ``val/hint`` is one mean over all data loaders, and runs the teacher up to
    its hint layers each time. ``EarlyStopping`` is paused in stage 1. ``ModelCheckpoint`` searches for the best
    checkpoint anew in stage 2.

    It takes all inputs, outputs and tasks of :class:`SupervisedModule`. Masked positions do not count in hints that
    have the positions of the mask, such as tokens (B, T, C).

    Args:
        student: Network to train, see :class:`SupervisedModule`.
        teacher: The trained network, or a ``Teacher`` around it. None is for ``test`` and ``predict`` alone.
        hints: Guided layer (student) to hint layer (teacher), by dotted path. Their outputs must be maps (B, C, L),
            (B, C, H, W) or (B, C, D, H, W), the same with the channels last, tokens (B, N, C) or vectors (B, C), or a
            tuple or mapping whose first tensor is one. Where the channels are follows from the layers around, see
            :class:`~kd_lightning.features.channels.ChannelTrace`. ``python -m kd_lightning layers`` lists the layers.
        hint_epochs: Number of epochs of stage 1, at least 0. With 0 this is plain distillation.
        hint_optimizer: Optimiser of stage 1, called with the parameters. Default: None, which means ``optimizer``.
        hint_lr_scheduler: Scheduler of stage 1, called with the optimiser. ReduceLROnPlateau follows ``val/hint``.
            Default: None, which means a constant learning rate.
        hint_patience: Stage 1 ends early after this many validations without a lower ``val/hint``, at least 1.
            Default: None, which means that it does not.
        hint_loss: Loss of the hint term, see :class:`~kd_lightning.losses.protocols.FeatureLoss`. Default: None, which
            means :class:`~kd_lightning.losses.HintLoss`, as in the paper.
        hint_weight: Weight of the hint term in stage 2, at least 0. Above 0, with ``hint_epochs`` 0, there is one joint
            stage, as in most libraries. The paper reports that this fails for thin, deep students. HintLoss is a sum
            over all entries of a map: a weight of about 1 over their number makes it as large as the other terms.
        projectors: Projectors by guided layer, from its feature to the hint's shape, both with the channels first. The
            missing ones are built, see :func:`~kd_lightning.features.regressors.build_projector`. They train with the
            student, and are not deployed.
        input_shape: Shape of one input, without the batch dimension, to build the projectors from, if the inputs are
            one tensor. Default: None, which means that the first training inputs are used when the fit begins.
        features: Further terms of stage 2, see :class:`DistillModule`.
        **kwargs: The other arguments of :class:`DistillModule`.

    Raises:
        InputError: If there are no hints; if a network does not have a layer, or never reaches it; if no built-in
            projector joins two shapes, or no layer shows where the channels are; if a given projector's output has
            another shape than the hint; if a guided output has no gradient; if ``hint_epochs`` leaves no epoch for
            stage 2; and as of :class:`DistillModule`.
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
        hint_loss: nn.Module | None = None,
        hint_weight: float = 0.0,
        projectors: dict[str, nn.Module] | None = None,
        input_shape: list[int] | None = None,
        features: dict[str, FeatureTerm] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, features=features, **kwargs)
        for name, number, least in (("hint_epochs", hint_epochs, 0), ("hint_patience", hint_patience, 1)):
            if number is not None and number < least:
                raise InputError(f"{name} must be at least {least}, got {number}")
        check_weight("hint_weight", hint_weight)
        self.save_hyperparameters("hints", "hint_epochs", "hint_patience", "hint_weight", "input_shape")
        self.hint_epochs = hint_epochs
        self.hint_optimizer = hint_optimizer
        self.hint_lr_scheduler = hint_lr_scheduler
        self.hint_patience = hint_patience
        self._joint = hint_weight > 0
        self._uses_hints = self._joint or hint_epochs > 0  # else this is plain distillation
        try:
            term = FeatureTerm(hints, hint_loss or HintLoss(), hint_weight, projector=projectors or None)
        except InputError as error:
            raise InputError(f"hints: {error}") from error
        if self._uses_hints:
            self.features["hint"] = term
        self._figure_inputs: Batch | None = None
        self._reset_stage()
        if input_shape is not None:
            x = torch.randn(SAMPLES, *input_shape, generator=torch.Generator().manual_seed(0))
            self.build_features(Batch(x))

    def _reset_stage(self) -> None:
        """Go back to the start of the first stage."""
        self.distilling = self.hint_epochs == 0
        self.distill_from_epoch = self.hint_epochs  # hint_patience may lower it
        self._best_hint_loss, self._wait_count = math.inf, 0
        self._norms_above: list[nn.Module] | None = None  # BatchNorm layers above the guided ones
        self._gradients_are_checked = False

    @property
    def term_epoch(self) -> int:
        """The epoch of stage 2, which decides the weights of feature terms; below 0 in stage 1."""
        return self.current_epoch - self.distill_from_epoch

    # The objective.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the hint term in stage 1, and all terms of distillation in stage 2."""
        if self.distilling:
            return super().losses(batch)
        if not self.features.is_built:
            self.build_features(batch)
        values = self.features.pair_values("hint", self._capture_hints(batch), batch, self.student)
        if self._trainer is not None and len(values) > 1:
            for layer, value in values.items():
                self._record_mean(f"train/hint/{layer or 'output'}", value, len(batch))
        value = with_all_gradients(self, sum_of(values), partial(self._stage_parameters, False))
        return {"hint": SampleTerm(1.0, value)}

    def _capture_hints(self, batch: Batch) -> Captured:
        """Return the features of the hint term. The student's layers above its guided layers are not computed."""
        captured = Captured(teacher=self.features.teacher_features(self.feature_teachers, batch))
        layers = self.features.all["hint"].layers
        with frozen_statistics(self._norms()), capture(self.student, [*layers], stop=True) as guided:
            self(batch.x)
        captured.student = guided
        return captured

    @property
    def _guided_parameters(self) -> frozenset[str]:
        """Names of the student's parameters that the guided layers depend on; empty until they are known."""
        return self.features.parameters_below.get("hint", frozenset())

    def _norms(self) -> list[nn.Module]:
        """Return the BatchNorm layers above the guided layers; their statistics stay as they are in stage 1."""
        if self._norms_above is None:
            below = self._guided_parameters
            self._norms_above = batch_norms_without(self.student, below) if below else []
        return self._norms_above

    def _stage_parameters(self, distilling: bool) -> list[nn.Parameter]:
        """Return the parameters that a stage trains."""
        if distilling:
            return [p for name, p in self.named_parameters() if self._joint or not name.startswith("features.hint.")]
        below = [p for name, p in self.student.named_parameters() if name in self._guided_parameters]
        return [*below, *self.features["hint"].parameters()]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs for each loss. In stage 1, checks that the first pass gives gradients to the guided layers."""
        with frozen_statistics([] if self.distilling else self._norms()):  # gradient checkpointing may compute them
            super().backward(loss, *args, **kwargs)
        if not (self.distilling or self._gradients_are_checked):
            check_first_gradients(self.student, self._guided_parameters)
            self._gradients_are_checked = True

    def unused_parameters(self) -> set[int]:
        """Return the ids of the parameters of feature terms whose weight is 0 in this epoch; none in stage 1."""
        return super().unused_parameters() if self.distilling else set()

    # The run.

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, checks the stages' lengths, and pauses EarlyStopping in stage 1."""
        super().setup(stage)
        if stage != TrainerFn.FITTING:
            return
        self._reset_stage()
        stoppers = self.trainer.early_stopping_callbacks
        if not self._joint:
            check_monitors(stoppers, "/hint", "use hint_patience to end stage 1")
        pause_early_stopping(stoppers, lambda trainer: trainer.lightning_module is self and not self.distilling)
        last = self.trainer.max_epochs
        if last is not None and 0 <= last <= self.hint_epochs and not getattr(self.trainer, "fast_dev_run", False):
            raise InputError(
                f"hint_epochs must be below max_epochs, {last}, so that stage 2 runs, got {self.hint_epochs}"
            )

    def configure_model(self) -> None:
        """Runs after setup. In a fit, builds the projectors from the first training inputs."""
        if self.is_fitting and self._uses_hints and not self._guided_parameters:
            self._figure_inputs = self.features.configure(self, self.feature_teachers)
        super().configure_model()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Runs at the start of fit and of stage 2. Builds the optimiser and scheduler of the current stage."""
        if self.distilling:
            return self._build_stage_2(self.distill_from_epoch)
        parameters = self._stage_parameters(distilling=False)
        if not self._guided_parameters:
            raise InputError("hints: the projectors are not built yet; set input_shape, or use Trainer.fit")
        if not any(p.requires_grad for p in parameters[: len(self._guided_parameters)]):
            raise InputError("hints: no parameter below the guided layers requires a gradient")
        built = build_optimizer(self, parameters, "hint_optimizer" if self.hint_optimizer is not None else "optimizer")
        return build_optimizers(self, built, "hint_lr_scheduler", monitor="val/hint", end=self.hint_epochs)

    def _build_stage_2(self, first: int) -> OptimizerLRScheduler:
        return build_optimizers(self, build_optimizer(self, self._stage_parameters(True)), first=first)

    def on_train_start(self) -> None:
        """Runs before the first epoch, or the rest of a resumed one. Enters the stage."""
        super().on_train_start()
        if self.hint_patience is not None and not self.trainer.enable_validation:
            raise InputError("hint_patience needs validation data, whose hint loss it watches")
        self._enter_stage()

    def _check_schedules(self) -> None:
        if self.distilling:
            check_schedules(self, first=self.distill_from_epoch)
            return
        check_schedules(self, "hint_lr_scheduler", end=self.hint_epochs)
        if self.lr_scheduler is not None:
            # hint_patience may end stage 1 after its first epoch
            first = 1 if self.hint_patience is not None and not self._boundary_is_known else self.distill_from_epoch
            stage_2: Any = self._build_stage_2(first)
            check_schedule("lr_scheduler", stage_2["lr_scheduler"]["scheduler"], self.lr_interval, self.trainer, first)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Stores the first inputs for figures, and checks the student's outputs."""
        if self._figure_inputs is None and self._uses_hints:
            self._figure_inputs = first_rows(self.unpack(batch), SAMPLES).map(Tensor.detach)
        if not self._outputs_are_checked and not self.distilling:  # stage 1 does not compute them
            run_once(self, self.student, first_rows(self.unpack(batch), SAMPLES).x)

    def on_train_epoch_start(self) -> None:
        """Runs at the start of each training epoch. Begins stage 2 when stage 1 is over."""
        self._enter_stage()
        self.log("stage", 2.0 if self.distilling else 1.0)
        if self._uses_hints:
            self.log("projector_parameters", float(self.features.all["hint"].size()))

    def _enter_stage(self) -> None:
        """Begin stage 2 if stage 1 is over."""
        if self.distilling or self.trainer.current_epoch < self.distill_from_epoch:
            return
        self._log_hint_figures("stage_1")
        self.distilling = True
        reset_best(self.trainer.checkpoint_callbacks)
        for parameter in self.parameters():
            parameter.grad = None
        self.trainer.strategy.setup_optimizers(self.trainer)
        rank_zero_info(f"epoch {self.trainer.current_epoch}: stage 2 begins, with a new optimiser")

    def on_train_end(self) -> None:
        """Runs at the end of training. Logs the last figures; warns if stage 2 was never reached."""
        super().on_train_end()
        self._log_hint_figures("stage_2" if self.distilling else "stage_1")
        if not self.distilling:
            rank_zero_warn("the run ended in stage 1: the student above its guided layers is untrained")

    def _log_hint_figures(self, stage: str) -> None:
        """Log a figure of each pair."""
        if self._figure_inputs is None:
            return
        pairs = cache(partial(self._figure_pairs, self._figure_inputs))

        def draw(guided: str, hint: str) -> Figure:
            projected, target = pairs()[guided]
            return hint_figure(target, projected, f"{guided} -> {hint}")

        for guided, hint in self.features.all["hint"].layers.items():
            log_figure(self, f"hints/{guided}/{stage}", partial(draw, guided, hint))

    def _figure_pairs(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the projected and the hint features of some inputs, by guided layer."""
        precision = self.trainer.precision_plugin
        batch = precision.convert_input(batch.to(self.device))
        term = self.features.all["hint"]
        with torch.no_grad(), evaluating(self.student), evaluating(term), precision.forward_context():
            captured = self._capture_hints(batch)
            return term.features(captured.student, captured.teacher, len(batch), batch.position_mask)

    # Validation: the hint loss, and the end of stage 1 by it.

    def evaluated_features(self) -> list[str]:
        """Return the names of the feature terms that a validation measures: the hint term in stage 1."""
        return super().evaluated_features() if self.distilling or not self.is_fitting else ["hint"]

    def log_feature_means(self) -> dict[str, Tensor]:
        """Log the means of the feature terms over a validation; end stage 1 after ``hint_patience``."""
        values = super().log_feature_means()
        if self.distilling or self.trainer.sanity_checking or not self.is_fitting:
            return values
        loss = float(values.get("val/hint", math.nan))
        if loss < self._best_hint_loss:
            self._best_hint_loss, self._wait_count = loss, 0
        else:
            self._wait_count += 1
        if self.hint_patience is not None and self._wait_count >= self.hint_patience:
            self.distill_from_epoch = min(self.distill_from_epoch, self.trainer.current_epoch + 1)
        return values

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hints"] = {
            "distilling": self.distilling,
            "distill_from_epoch": self.distill_from_epoch if self._boundary_is_known else None,
            "best": self._best_hint_loss,
            "waited": self._wait_count,
        }

    @property
    def _boundary_is_known(self) -> bool:
        """Whether stage 1 has ended, or ``hint_patience`` has set its end; else a resume may change ``hint_epochs``."""
        return self.distilling or self.distill_from_epoch != self.hint_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Goes to its stage."""
        if (saved := checkpoint.get("hints")) is not None:
            self.distilling = saved["distilling"]
            self._best_hint_loss, self._wait_count = saved["best"], saved["waited"]
            if saved["distill_from_epoch"] is not None:
                self.distill_from_epoch = saved["distill_from_epoch"]
        super().on_load_checkpoint(checkpoint)
