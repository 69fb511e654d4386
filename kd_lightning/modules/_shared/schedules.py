"""Schedules of the learning rate and the length of training: lengths from the run, and checks of those in a config."""

from __future__ import annotations

import math
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, OneCycleLR, PolynomialLR, SequentialLR

from kd_lightning.errors import InputError
from kd_lightning.schedules import lengths_of

_UNKNOWN = sys.maxsize  # the length of a run whose data are not loaded yet
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "base_momentum", "max_momentum", "betas")


# Lengths that are left out.


def run_length(name: str, trainer: Trainer | None, interval: str, first: int = 0, end: float = math.inf) -> int:
    """Return how many epochs or optimiser steps a run takes, at least 1, for a schedule that leaves out its length.

    Before the trainer has its training data, the number may be a placeholder: see :func:`await_length`.

    Args:
        name: Name of the argument in the message.
        trainer: The trainer of the fit.
        interval: ``"epoch"`` or ``"step"``.
        first: Epoch in which the schedule starts.
        end: Epoch before which the schedule ends at the latest.

    Raises:
        InputError: If the number is not known.
    """
    reason = "there is no trainer"
    if trainer is not None:
        length = _length(trainer, interval, first, end)
        if length is not None and math.isfinite(length):
            return max(int(length), 1)
        reason = "the trainer has neither max_epochs nor max_steps"
        if length is None:
            reason = "the data loader has no length; set trainer.max_steps, max_epochs: -1 and lr_interval: step"
            if _accumulation_changes(trainer):
                reason = "GradientAccumulationScheduler changes it"
    raise InputError(f"{name}: its length is left out, so it is that of the run, which is not known: {reason}")


def await_length(name: str, scheduler: Any, module: LightningModule) -> None:
    """Prepare a schedule that takes the length of the run, if that is not known yet.

    It gets the length when training starts, by :func:`check_schedules`, or before its first step, if a subclass of the
    module leaves that out. Until then it has a class of its own, since checkpoints save each attribute.
    """
    if module.trainer.train_dataloader is not None:
        return
    kind = type(scheduler)

    def step(self: Any, *args: Any) -> None:
        _complete_length(name, self, module)
        self.step(*args)

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "_awaiting": kind})


def _complete_length(name: str, scheduler: Any, module: LightningModule) -> None:
    """Give a schedule the length of the run, if it waits for it.

    A resume has restored the checkpoint's length. If that is another one, the learning rates go on as in a run that
    has had the new length from its start.
    """
    if (kind := getattr(scheduler, "_awaiting", None)) is None:
        return
    scheduler.__class__ = kind
    number = [config.scheduler for config in module.trainer.lr_scheduler_configs].index(scheduler)
    fresh: Any = _init_optimizers_and_lr_schedulers(module)[1][number].scheduler
    before, after = [*lengths_of(scheduler)], [*lengths_of(fresh)]
    if before == after:
        return
    if max(before, default=0) < _UNKNOWN // 2:
        rank_zero_warn(
            f"{name}: the length of the run is another one than in the checkpoint (the lengths are {after}, not "
            f"{before}); from here on the learning rates are those of a run of this length"
        )
    fresh.optimizer._opt_called = True  # else torch warns that the schedule steps first
    for _ in range(_position(scheduler)):
        fresh.step()
    scheduler.load_state_dict(fresh.state_dict())
    for group, other in zip(scheduler.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        group.update({key: other[key] for key in _SCHEDULED if key in other})


def _position(scheduler: Any) -> int:
    """Return how often a schedule has stepped."""
    return scheduler.last_epoch if hasattr(scheduler, "last_epoch") else _position(scheduler._schedulers[0])


def _length(trainer: Trainer, interval: str, first: int, end: float) -> float | None:
    """Return in how many epochs or optimiser steps a run trains from one epoch to another. None if that is unknown."""
    epochs, most = _limits(trainer, end)
    if interval == "epoch" and math.isinf(most):
        return epochs - first
    if _accumulation_changes(trainer):
        return None
    if math.isinf(min(epochs, most)):
        return math.inf
    if trainer.train_dataloader is None:
        return _UNKNOWN
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return most if interval == "step" and first == 0 and math.isinf(epochs) else None
    each = _steps_of_epoch(trainer)
    steps = min(epochs * each, most) - first * each
    return steps if interval == "step" else math.ceil(steps / each)


def _limits(trainer: Trainer, end: float = math.inf) -> tuple[float, float]:
    """Return the epochs and the optimiser steps after which a run ends at the latest."""
    epochs = trainer.max_epochs
    epochs_at_most = min(end, math.inf if epochs is None or epochs < 0 else epochs)
    return epochs_at_most, math.inf if trainer.max_steps < 0 else trainer.max_steps


def _steps_of_epoch(trainer: Trainer) -> int:
    return max(math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches), 1)


# Lengths in a config.


def check_schedule(
    name: str, scheduler: Any, interval: str, trainer: Trainer, first: int = 0, end: float = math.inf
) -> None:
    """Raise InputError if a schedule ends before training does. Call it when the trainer has its training data.

    Only OneCycleLR fails when it ends. Other schedules with ``total_steps`` get a warning, and OneCycleLR too if
    ``max_time`` may end the training earlier; so does CosineAnnealingLR, whose learning rate rises again then.

    Args:
        name: Name of the argument in the message.
        scheduler: The scheduler, before its first step or later.
        interval: ``"epoch"`` or ``"step"``.
        trainer: The trainer of the fit.
        first: Epoch in which the schedule starts.
        end: Epoch before which the schedule ends at the latest.
    """
    planned = _planned(trainer, interval, first, end)
    if planned is None:
        return
    unit = "epochs (lr_interval: epoch)" if interval == "epoch" else "optimiser steps (lr_interval: step)"
    _check_milestones(name, scheduler, _length(trainer, interval, first, end), trainer, unit)
    for part, steps in _parts(scheduler, planned):
        longer = f"takes {steps:.0f} {unit}" if math.isfinite(steps) else "has neither max_epochs nor max_steps"
        if isinstance(part, PolynomialLR) and steps > part.total_iters:
            takes = f"after total_iters {part.total_iters}, but the training {longer}"
            rank_zero_warn(f"{name}: PolynomialLR has a learning rate of 0 {takes}")
        # the rate after the last step is not used
        if getattr(type(part), "get_lr", None) is CosineAnnealingLR.get_lr and steps - 1 > part.T_max:
            rises = f"its learning rate rises again after T_max {part.T_max}, but the training {longer}"
            rank_zero_warn(f"{name}: {type(part).__name__}: {rises}")
        total = getattr(part, "total_steps", None)
        if not isinstance(total, int) or steps <= total:
            continue
        text = f"{name}: {type(part).__name__} ends after total_steps {total}, but the training {longer}"
        if not isinstance(part, OneCycleLR) or any(isinstance(c, Timer) for c in _callbacks(trainer)):
            rank_zero_warn(text)
        else:
            raise InputError(f"{text}; total_steps must be at least as many")


def _check_milestones(name: str, scheduler: Any, length: float | None, trainer: Trainer, unit: str) -> None:
    """Warn if a part of a schedule begins after the end of the run."""
    if not isinstance(scheduler, SequentialLR) or length is None or getattr(trainer, "fast_dev_run", False):
        return
    for milestone, part in zip(scheduler._milestones, scheduler._schedulers[1:], strict=True):
        if milestone >= length:
            run = f"the run, which takes {length:.0f} {unit}: {type(part).__name__} never begins"
            rank_zero_warn(f"{name}: milestone {milestone} lies outside of {run}")


def check_schedules(module: LightningModule, name: str = "lr_scheduler", first: int = 0, end: float = math.inf) -> None:
    """Complete and check the schedulers of a module, see :func:`check_schedule`. Call it in ``on_train_start``."""
    for config in module.trainer.lr_scheduler_configs:
        _complete_length(name, config.scheduler, module)
        check_schedule(name, config.scheduler, config.interval, module.trainer, first, end)


def _planned(trainer: Trainer, interval: str, first: int, end: float) -> float | None:
    """Return how often a scheduler steps from one epoch to another. None if that is unknown."""
    if _accumulation_changes(trainer):
        return None
    end, most = _limits(trainer, end)
    if math.isinf(trainer.num_training_batches):  # a loader without length
        return most if interval == "step" and first == 0 and math.isinf(end) else None
    each = _steps_of_epoch(trainer)
    if interval == "step":
        return max(min(end * each, most) - first * each, 0)
    return max(min(end, most if math.isinf(most) else most // each) - first, 0)


def _parts(scheduler: Any, steps: float) -> list[tuple[Any, float]]:
    """Return a scheduler, or those that it consists of, each with its number of steps."""
    if isinstance(scheduler, ChainedScheduler):
        return [found for part in scheduler._schedulers for found in _parts(part, steps)]
    if not isinstance(scheduler, SequentialLR):
        return [(scheduler, steps)]
    starts: list[float] = [0, *scheduler._milestones]
    ends = [*(milestone - 1 for milestone in scheduler._milestones), math.inf]
    parts = zip(scheduler._schedulers, starts, ends, strict=True)
    return [found for part, start, end in parts for found in _parts(part, max(min(steps, end) - start, 0))]


def _accumulation_changes(trainer: Trainer) -> bool:
    return any(isinstance(callback, GradientAccumulationScheduler) for callback in _callbacks(trainer))


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]
