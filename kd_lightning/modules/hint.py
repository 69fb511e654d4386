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
from kd_lightning.features.projectors import Projectors, check_gradients, first_line
from kd_lightning.inputs import describe, map_inputs
from kd_lightning.losses import HintLoss
from kd_lightning.losses.base import check_weight
from kd_lightning.modules._shared.first_inputs import first_inputs, first_rows, run_once
from kd_lightning.modules._shared.frozen_statistics import batch_norms_without, frozen_statistics
from kd_lightning.modules._shared.hint_figure import hint_figure
from kd_lightning.modules._shared.hint_means import HintMeans
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.optimizers import build_optimizer, build_optimizers
from kd_lightning.modules._shared.schedules import check_schedule, check_schedules
from kd_lightning.modules._shared.stage_callbacks import check_monitors, pause_early_stopping, reset_best
from kd_lightning.modules._shared.stage_gradients import check_first_gradients, with_all_gradients
from kd_lightning.modules.distill import DistillModule
from kd_lightning.runs.figures.log_figure import log_figure

_SAMPLES = 4  # that the projectors are built from and the figures are drawn of


class HintModule(DistillModule):
    """Train a thin, deep student in two stages within one fit (FitNets, Romero et al. 2014).

    Stage 1 takes ``hint_epochs``. The guided layers of the student learn to match the teacher's hint layers, through
    projectors, by :class:`~kd_lightning.losses.HintLoss`. Only the projectors and the student up to its deepest guided
    layer train; the layers above are not computed. Stage 2 trains the whole student on :class:`DistillModule`'s
    objective, with a new optimiser and scheduler (``optimizer`` and ``lr_scheduler``). ``SoftWeightAnnealing`` counts
    its epochs from the start of stage 2. FitNets' lambda of 4 to 1 at temperature 3 is a ``soft_weight`` of 0.31 to
    0.10.

    Logs what :class:`DistillModule` does, and ``stage`` (1 or 2), ``train/hint`` (the sum over the pairs),
    ``train/hint/<guided>``, the same for ``val``, ``projector_parameters``, and at the end of each stage a figure of
    hint maps above the student's. ``val/hint`` is one mean over all data loaders, and runs the teacher up to its hint
    layers each time. ``EarlyStopping`` is paused in stage 1. ``ModelCheckpoint`` searches for the best checkpoint anew
    in stage 2.

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
        hint_weight: Weight of the hint term in stage 2, at least 0. Above 0, with ``hint_epochs`` 0, there is one joint
            stage, as in most libraries. The paper reports that this fails for thin, deep students. The term is a sum
            over all entries of a map: a weight of about 1 over their number makes it as large as the other terms.
        projectors: Projectors by guided layer, from its output to the hint's shape. The missing ones are built, see
            :func:`~kd_lightning.features.regressors.build_projector`. They train with the student, and are not
            deployed.
        input_shape: Shape of one input, without the batch dimension, to build the projectors from, if the inputs are
            one tensor. Default: None, which means that the first training inputs are used when the fit begins.
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
        hint_weight: float = 0.0,
        projectors: dict[str, nn.Module] | None = None,
        input_shape: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        for name, number, least in (("hint_epochs", hint_epochs, 0), ("hint_patience", hint_patience, 1)):
            if number is not None and number < least:
                raise InputError(f"{name} must be at least {least}, got {number}")
        check_weight("hint_weight", hint_weight)
        if hint_weight > 0 and self.teacher is not None and self.teacher.cache is not None:
            raise InputError(f"hint_weight must be 0 with a teacher that has a cache, got {hint_weight}")
        self.save_hyperparameters("hints", "hint_epochs", "hint_patience", "hint_weight", "input_shape")
        self.projectors = Projectors(hints, projectors)
        self.hint_epochs = hint_epochs
        self.hint_optimizer = hint_optimizer
        self.hint_lr_scheduler = hint_lr_scheduler
        self.hint_patience = hint_patience
        self.hint_weight = hint_weight
        self.hint_loss = HintLoss()
        self._joint = hint_weight > 0
        self._uses_hints = self._joint or hint_epochs > 0  # else this is plain distillation
        self._figure_inputs: Batch | None = None
        self._hint_means = HintMeans()
        self._reset_stage()
        if input_shape is not None:
            x = torch.randn(_SAMPLES, *input_shape, generator=torch.Generator().manual_seed(0))
            self._build_projectors(Batch(x))

    def _reset_stage(self) -> None:
        """Go back to the start of the first stage."""
        self.distilling = self.hint_epochs == 0
        self.distill_from_epoch = self.hint_epochs  # hint_patience may lower it
        self._best_hint_loss, self._wait_count = math.inf, 0
        self._norms_above: list[nn.Module] | None = None  # BatchNorm layers above the guided ones
        self._gradients_are_checked = False

    def _build_projectors(self, batch: Batch) -> None:
        """Build the projectors from the inputs of a batch."""
        if self.teacher is None or not self._uses_hints:
            return
        try:
            batch = batch.to(self.device)
            no_autocast = torch.autocast(self.device.type, enabled=False)
            with self.teacher.evaluating():
                with torch.no_grad(), no_autocast, torch.random.fork_rng(devices=[]):
                    teacher_x = self.teacher.prepare(map_inputs(torch.clone, batch.teacher_x))  # it may change them
                self.projectors.build_from_networks(self.student, batch.x, self.teacher.network, teacher_x, self.call)
        except (RuntimeError, TypeError) as error:
            reason = f"the networks cannot take inputs of shape {describe(batch.x)}: {first_line(error)}"
            raise InputError(f"hints: {reason}") from error

    # The objective.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the hint term in stage 1, the hard and the soft term in stage 2, all three in joint training."""
        if self.teacher is None:
            raise InputError("training needs the teacher; teacher=None is for test and predict alone")
        if not self.projectors.shapes:
            self._build_projectors(batch)
        layers, teacher_layers = [*self.projectors.hints], [*self.projectors.hints.values()]
        if not self.distilling:
            hints = self._compute_hints(batch)  # first: the student's activations would take memory meanwhile
            with frozen_statistics(self._norms()), capture(self.student, layers, stop=True) as guided:
                self(batch.x)
            value = self._hint_term(guided, hints, batch)
            return {"hint": LossTerm(1.0, with_all_gradients(self, value, partial(self._stage_parameters, False)))}
        if self._joint:
            with capture(self.student, layers) as guided, capture(self.teacher.network, teacher_layers) as hints:
                terms = super().losses(batch)
            return terms | {"hint": LossTerm(self.hint_weight, self._hint_term(guided, hints, batch))}
        terms = super().losses(batch)
        weight, value = terms["soft"]
        value = with_all_gradients(self, value, partial(self._stage_parameters, True))
        return terms | {"soft": LossTerm(weight, value)}

    def _compute_hints(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outputs of the teacher's hint layers, by name; the layers above are not computed."""
        assert self.teacher is not None
        with capture(self.teacher.network, [*self.projectors.hints.values()], stop=True) as hints:
            self.teacher.compute(batch)
        return hints

    def _norms(self) -> list[nn.Module]:
        """Return the BatchNorm layers above the guided layers; their statistics stay as they are in stage 1."""
        if self._norms_above is None:
            below = self.projectors.guided_parameters
            self._norms_above = batch_norms_without(self.student, below) if below else []
        return self._norms_above

    def _hint_term(self, guided: dict[str, Tensor], hints: dict[str, Tensor], batch: Batch) -> Tensor:
        """Return the sum of the pairs' hint losses."""
        if torch.is_grad_enabled():
            check_gradients(guided.items(), partial(self.projectors.are_frozen_below, self.student))
        values = self._distances(guided, hints, batch)
        if self._trainer is not None and self.trainer.training:
            for name, value in values.items():
                self._record_mean(f"train/hint/{name}", value, len(batch))
        return torch.stack([*values.values()]).sum()

    def _distances(self, guided: dict[str, Tensor], hints: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the hint loss of each pair, by guided layer."""
        pairs = self.projectors.pairs(guided, hints, len(batch), batch.position_mask).items()
        return {name: self.hint_loss(*pair) for name, pair in pairs}

    def _stage_parameters(self, distilling: bool) -> list[nn.Parameter]:
        """Return the parameters that a stage trains."""
        if distilling:
            return [p for name, p in self.named_parameters() if self._joint or not name.startswith("projectors.")]
        below = [p for name, p in self.student.named_parameters() if name in self.projectors.guided_parameters]
        return [*below, *self.projectors.parameters()]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs for each loss. In stage 1, checks that the first pass gives gradients to the guided layers."""
        with frozen_statistics([] if self.distilling else self._norms()):  # gradient checkpointing may compute them
            super().backward(loss, *args, **kwargs)
        if not (self.distilling or self._gradients_are_checked):
            check_first_gradients(self.student, self.projectors.guided_parameters)
            self._gradients_are_checked = True

    # The run.

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, checks the stages' lengths, and pauses EarlyStopping in stage 1."""
        super().setup(stage)
        self._hint_means.clear()
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
        if not self.is_fitting or not self._uses_hints or self.projectors.guided_parameters:
            return
        try:
            inputs = first_inputs(self, _SAMPLES).to("cpu")
        except Exception as error:
            message = f"hints: cannot read the first training inputs ({first_line(error)}); set input_shape"
            raise InputError(message) from error
        self._figure_inputs = self.trainer.strategy.broadcast(inputs)  # sizes may differ between processes
        self._build_projectors(self._figure_inputs)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Runs at the start of fit and of stage 2. Builds the optimiser and scheduler of the current stage."""
        if self.distilling:
            return self._build_stage_2(self.distill_from_epoch)
        parameters = self._stage_parameters(distilling=False)
        if not self.projectors.guided_parameters:
            raise InputError("hints: the projectors are not built yet; set input_shape, or use Trainer.fit")
        if not any(p.requires_grad for p in parameters[: len(self.projectors.guided_parameters)]):
            raise InputError("hints: no parameter below the guided layers requires a gradient")
        built = build_optimizer(self, parameters, "hint_optimizer" if self.hint_optimizer is not None else "optimizer")
        return build_optimizers(self, built, "hint_lr_scheduler", monitor="val/hint", end=self.hint_epochs)

    def _build_stage_2(self, first: int) -> OptimizerLRScheduler:
        return build_optimizers(self, build_optimizer(self, self._stage_parameters(True)), first=first)

    def on_train_start(self) -> None:
        """Runs before the first epoch, or the rest of a resumed one. Reports the projectors, and enters the stage."""
        super().on_train_start()
        if self.projectors.shapes:
            rank_zero_info(self.projectors.describe())
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
            self._figure_inputs = first_rows(self.unpack(batch), _SAMPLES).map(Tensor.detach)
        if not self._outputs_are_checked and not self.distilling:  # stage 1 does not compute them
            run_once(self, self.student, first_rows(self.unpack(batch), _SAMPLES).x)

    def on_train_epoch_start(self) -> None:
        """Runs at the start of each training epoch. Begins stage 2 when stage 1 is over."""
        self._enter_stage()
        self.log("stage", 2.0 if self.distilling else 1.0)
        if self.projectors:
            self.log("projector_parameters", float(self.projectors.size()))

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

        for guided, hint in self.projectors.hints.items():
            log_figure(self, f"hints/{guided}/{stage}", partial(draw, guided, hint))

    def _figure_pairs(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the projected and the hint features of some inputs, by guided layer."""
        precision = self.trainer.precision_plugin
        batch = precision.convert_input(batch.to(self.device))
        with torch.no_grad(), evaluating(self.student), evaluating(self.projectors), precision.forward_context():
            hints = self._compute_hints(batch)
            with capture(self.student, [*self.projectors.hints], stop=True) as guided:
                self(batch.x)
            return self.projectors.pairs(guided, hints, len(batch), batch.position_mask)

    # Validation: the hint loss, and the end of stage 1 by it.

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:
        if not self.is_fitting or (self.distilling and not self._joint):
            return super()._evaluate(stage, batch, batch_idx, dataloader_idx)
        batch = self.unpack(batch)
        hints = self._compute_hints(batch)  # first: the student's activations would take memory meanwhile
        with capture(self.student, [*self.projectors.hints]) as guided:
            predicted = super()._evaluate(stage, batch, batch_idx, dataloader_idx)
        self._hint_means.update(self._distances(guided, hints, batch), 0 if batch.is_padding else len(batch))
        return predicted

    def on_validation_epoch_end(self) -> None:
        """Runs at the end of each validation. Logs the metrics; ends stage 1 after ``hint_patience``."""
        super().on_validation_epoch_end()
        values = self._hint_means.compute()
        self.log_dict(values, sync_dist=True)
        if self.distilling or self.trainer.sanity_checking or not self.is_fitting:
            return
        loss = float(values.get("val/hint", math.nan))
        if loss < self._best_hint_loss:
            self._best_hint_loss, self._wait_count = loss, 0
        else:
            self._wait_count += 1
        if self.hint_patience is not None and self._wait_count >= self.hint_patience:
            self.distill_from_epoch = min(self.distill_from_epoch, self.trainer.current_epoch + 1)

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the stage, and the shapes that the projectors are built from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hints"] = {
            "pairs": self.projectors.hints,
            "shapes": self.projectors.shapes,
            "layouts": self.projectors.layouts,
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
        """Runs before a checkpoint's weights are loaded. Builds its projectors, and goes to its stage."""
        if (saved := checkpoint.get("hints")) is not None:
            if saved["pairs"] != self.projectors.hints:
                raise InputError(
                    f"hints: the checkpoint was trained with {saved['pairs']}, got {self.projectors.hints}"
                )
            if saved["shapes"]:
                self.projectors.build(saved["shapes"], self.device, torch.float32, saved.get("layouts"))
            self.distilling = saved["distilling"]
            self._best_hint_loss, self._wait_count = saved["best"], saved["waited"]
            if saved["distill_from_epoch"] is not None:
                self.distill_from_epoch = saved["distill_from_epoch"]
        super().on_load_checkpoint(checkpoint)
