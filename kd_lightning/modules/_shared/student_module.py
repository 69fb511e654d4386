"""The trunk of all modules: a student that trains on a weighted sum of terms."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, call
from kd_lightning.modules._shared.checks import check_choice, check_start
from kd_lightning.modules._shared.feature_terms import Captured, FeatureTerms, sum_of
from kd_lightning.modules._shared.finite_check import FiniteCheck
from kd_lightning.modules._shared.hard_loss import must_synchronize
from kd_lightning.modules._shared.lean_module import LeanModule
from kd_lightning.modules._shared.loss_terms import LossTerm, SampleTerm, weighted_sum
from kd_lightning.modules._shared.network_errors import explain_single_row
from kd_lightning.modules._shared.optimizers import build_optimizer, build_optimizers
from kd_lightning.modules._shared.parameter_groups import check_groups
from kd_lightning.modules._shared.schedules import check_schedules
from kd_lightning.modules._shared.stage_gradients import with_all_gradients
from kd_lightning.modules._shared.term_building import standardize_by
from kd_lightning.runs.resume import prepare_resume, store_position
from kd_lightning.runs.weights import check_fit, match_keys
from kd_lightning.teachers.input_guard import InputGuard


class StudentModule(LeanModule):
    """Train a student on a weighted sum of terms, with or without labels; an exact resume; checks of finite numbers.

    A method adds its constructor and :meth:`losses`. Logs ``train/loss``, each term as ``train/<name>`` and its weight
    as ``<name>_weight``, as means over the epoch.

    Args:
        student: Network to train.
        optimizer: Called with the parameters that require a gradient.
        lr_scheduler: Called with the optimiser. ReduceLROnPlateau follows its ``monitor``, or ``val/loss`` if it has
            none. Default: None, which means a constant learning rate. CosineAnnealingLR without ``T_max``, OneCycleLR
            without ``total_steps``, and the last part of a :class:`~kd_lightning.schedules.SequentialSchedule` take
            the length of the run, in the unit of ``lr_interval``.
        lr_interval: When the scheduler steps: each ``"epoch"`` or each optimiser ``"step"``.
        weight_decay_exclude_1d: Whether biases and other parameters of at most 1 dimension, as of norms, have no weight
            decay, as timm's ``param_groups_weight_decay`` does; nor those that a network's ``no_weight_decay()`` names.
            The optimiser then has the groups ``decay`` and ``no_decay``.

    Raises:
        InputError: If the interval is unknown. In a fit, if the student has nothing to train, if OneCycleLR ends before
            training does, or if the length of the run is needed and not known.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        optimizer: OptimizerCallable = Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
        weight_decay_exclude_1d: bool = False,
    ) -> None:
        super().__init__()
        check_choice("lr_interval", lr_interval, ("epoch", "step"))
        self.student = student
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.weight_decay_exclude_1d = weight_decay_exclude_1d
        self.features = FeatureTerms(None)  # a method may set others
        self._guards: dict[str, InputGuard] = {}
        self._finite_check = FiniteCheck()

    # What a project overrides.

    def unpack(self, batch: Any) -> Batch:
        """Convert a batch of the data loader. A project with batches of another kind overrides this."""
        return Batch.from_any(batch)

    def call(self, network: nn.Module, x: Inputs) -> Any:
        """Call the student, or another network that trains, with inputs. Returns what the network returns.

        A project whose networks are called in another way overrides this. A frozen teacher's ``preprocess`` may do so.
        """
        return call(network, x)

    def guarded_call(self, role: str, network: nn.Module, x: Inputs) -> Any:
        """Call a network by :meth:`call`. One that changes its inputs in place gets a copy: others get them, too.

        Args:
            role: Name of the network in this module, such as "student".
            network: The network.
            x: The inputs.
        """
        with self._guards.setdefault(role, InputGuard(role)).protect(x) as given:
            return self.call(network, given)

    # What a method overrides.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of the objective, by name."""
        raise NotImplementedError

    def step_terms(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of a training step, by name."""
        return self.losses(batch)

    def record_terms(self, terms: dict[str, LossTerm], loss: Tensor, batch: Batch) -> None:
        """Add the terms and their weighted sum to the means over the epoch."""
        add, rows = self._epoch_means.add, len(batch)
        for name, (weight, value) in terms.items():
            add(f"train/{name}", value, rows)
            add(f"{name}_weight", weight, rows)
        add("train/loss", loss, rows)

    # Feature terms.

    @property
    def feature_teachers(self) -> Sequence[nn.Module]:
        """The teachers whose layers the feature terms compare with the student's."""
        return ()

    @property
    def teachers_compute_all(self) -> bool:
        """Whether each teacher's pass in a training step is over all samples, so that features are captured in it."""
        return True

    @property
    def term_epoch(self) -> int:
        """The epoch that decides the weights of feature terms: it counts from the first one that has them."""
        return self.current_epoch

    def capture_features(self, batch: Batch, names: Collection[str] | None = None) -> AbstractContextManager[Captured]:
        """Capture the layers of feature terms in the passes of all networks inside the block.

        Args:
            batch: The batch.
            names: The terms that are needed. Default: None, which means those that have a weight in this epoch.
        """
        if not self.features:
            return nullcontext(Captured())
        if not self.features.is_built:
            self.build_features(batch)
        weights = self.features.active(self.term_epoch) if names is None else dict.fromkeys(names, 1.0)
        return self.features.capturing(
            self.student, self.feature_teachers, batch, weights, apart=not self.teachers_compute_all
        )

    def feature_losses(self, captured: Captured, batch: Batch) -> dict[str, LossTerm]:
        """Return the feature terms of a training batch."""
        if not self.features:
            return {}
        terms: dict[str, LossTerm] = {}
        for name, weight in captured.weights.items():
            values = self.features.pair_values(name, captured, batch, self.student)
            if self._trainer is not None and len(values) > 1:
                for layer, value in values.items():
                    self._record_mean(f"train/{name}/{layer or 'output'}", value, len(batch))
            terms[name] = SampleTerm(weight, sum_of(values))
        return terms

    def build_features(self, batch: Batch, samples: int | None = None) -> None:
        """Build the feature terms, which depend on the shapes of layers, and fit their standardizations.

        A Trainer's fit does so. Without one, call it before ``configure_optimizers``.

        Args:
            batch: A batch of training inputs, all of which standardizations are fitted to.
            samples: Number of samples of the data, for losses that store each one.
        """
        self.features.build(self, self.feature_teachers, batch, samples)
        if any(term.standardizations for term in self.features.all.values()):
            standardize_by(self.features, self.feature_teachers, batch, self.device)

    def configure_model(self) -> None:
        """Runs after setup. In a fit, builds the feature terms from the first training inputs."""
        if self.is_fitting and self.features:
            self.features.configure(self, self.feature_teachers)
            self._ddp_params_and_buffers_to_ignore = self.features.own_buffers()  # torch's DDP reads this

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Sets the layers that teachers give, and reports the feature terms."""
        self.features.set_teacher_layers(self.feature_teachers)  # also without terms: an earlier fit may have had some
        if self.features:
            callbacks: Any = getattr(self.trainer, "callbacks", ())
            if not any(isinstance(part, BaseFinetuning) for part in callbacks):  # it unfreezes later
                self.features.check_trainable(self.student)
            self.features.report()

    def unused_parameters(self) -> set[int]:
        """Return the ids of the parameters of feature terms whose weight is 0 in this epoch."""
        return self.features.unused_parameters(self.term_epoch)

    def _parameters_in_use(self) -> list[nn.Parameter]:
        unused = self.unused_parameters()
        return [p for p in self.parameters() if id(p) not in unused]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Runs before each optimiser step. Removes gradients of 0, which DDP needs: weight decay would follow them."""
        if self.features and (unused := self.unused_parameters()):
            for parameter in self.features.parameters():
                if id(parameter) in unused:
                    parameter.grad = None

    def log_feature_means(self) -> dict[str, Tensor]:
        """Log the means of the feature terms over a validation, and return them by chart."""
        values = self.features.means()
        self.log_dict(values, sync_dist=True)
        return values

    def evaluated_features(self) -> list[str]:
        """Return the names of the feature terms that a validation measures: from the start of a warm-up, too."""
        if not self.features or not self.is_fitting:
            return []
        return [name for name, term in self.features.all.items() if term.weight and not term.trains_only]

    # The steps.

    def setup(self, stage: str) -> None:
        """Runs at the start of fit, validate, test and predict. Resets what an earlier run stored."""
        self._guards.clear()
        self._finite_check = FiniteCheck()
        self._epoch_means.clear()
        self.features.clear_means()  # of an interrupted validation
        if stage == TrainerFn.FITTING:
            self.features.start_fit(self)
        check_start(self.student, self._trainer, stage)

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer is fitting this module: not validate, test or predict, and no fit that has ended."""
        if self._trainer is None:
            return False
        state = self.trainer.state
        return state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def on_train_start(self) -> None:
        """Runs before the first epoch. Raises InputError if a learning rate schedule ends before training does."""
        self._check_schedules()
        self._log_means_of_whole_epoch()  # of an epoch that was interrupted after its last batch

    def _check_schedules(self) -> None:
        check_schedules(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Runs for each training batch, also without a Trainer. Returns the weighted sum of the terms."""
        batch = self.unpack(batch)
        try:
            terms = self.step_terms(batch)
        except ValueError as error:
            explain_single_row(error, len(batch))
            raise
        loss = weighted_sum(terms)
        if self.features:
            loss = with_all_gradients(self, loss, self._parameters_in_use)
        if must_synchronize(loss) or not math.isfinite(loss.item()):  # else all terms are finite
            self._finite_check.record({name: value for name, (_, value) in terms.items()}, self.global_step)
        if self._may_synchronize(loss):
            self._finite_check.check()
        if self._trainer is not None:
            self.record_terms(terms, loss, batch)
            if self._is_logging_step():
                self.log("train/loss_step", loss)  # not in the progress bar, which would synchronize each step
        return loss

    # Lightning inspects the signature in each step, unless it is stored
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Raises InputError if a term or weight is not finite.

        Adds what an exact resume needs.
        """
        self._finite_check.check(checkpoint["state_dict"])
        if self.features:
            checkpoint["features"] = self.features.shapes()
        if self._trainer is not None:
            store_position(self.trainer, checkpoint)
            self._epoch_means.store(self, checkpoint)

    def on_train_end(self) -> None:
        """Runs at the end of training, before the student is deployed. Raises InputError as before a checkpoint."""
        self._finite_check.check(self.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Raises InputError, in one line, if they do not fit."""
        if self.features:
            dtype = next((p.dtype for p in self.student.parameters() if p.is_floating_point()), torch.float32)
            self.features.restore(checkpoint.get("features", {}), checkpoint["state_dict"], self.device, dtype)
        state = checkpoint["state_dict"] = match_keys(checkpoint["state_dict"], self.state_dict())
        if self._trainer is not None and self.strict_loading:  # without a trainer, load_state_dict knows whether it is
            name = type(self).__name__
            check_fit(state, self.state_dict(), f"ckpt_path: the checkpoint does not fit {name}")
        if self.is_fitting:
            check_groups(checkpoint, self.weight_decay_exclude_1d)
            prepare_resume(self.trainer, checkpoint)
            self._epoch_means.restore(self, checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Runs at the start of fit. Builds the optimiser of all trainable parameters, and the scheduler."""
        if not self.features.is_built:
            raise InputError("features: not built yet; use Trainer.fit, or call build_features(batch) before")
        return build_optimizers(self, build_optimizer(self, self.parameters()))
