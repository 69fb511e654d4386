"""A check of learning rate schedules of a fixed length, which fail when training is longer."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR, SequentialLR

from kd_lightning.errors import InputError


def check_schedule(
    name: str, scheduler: Any, interval: str, trainer: Trainer, first: int = 0, end: float = math.inf
) -> None:
    """Raise InputError if a schedule ends before training does. Call it when the trainer has its training data.

    Only OneCycleLR fails when it ends. Other schedules with ``total_steps`` get a warning, and OneCycleLR too if
    ``max_time`` may end the training earlier.

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
    for part, steps in _parts(scheduler, planned):
        total = getattr(part, "total_steps", None)
        if not isinstance(total, int) or steps <= total:
            continue
        unit = "epochs (lr_interval: epoch)" if interval == "epoch" else "optimiser steps (lr_interval: step)"
        longer = f"takes {steps:.0f} {unit}" if math.isfinite(steps) else "has neither max_epochs nor max_steps"
        text = f"{name}: {type(part).__name__} ends after total_steps {total}, but the training {longer}"
        if not isinstance(part, OneCycleLR) or any(isinstance(c, Timer) for c in _callbacks(trainer)):
            rank_zero_warn(text)
        else:
            raise InputError(f"{text}; total_steps must be at least as many")


def check_schedules(trainer: Trainer, name: str = "lr_scheduler", first: int = 0, end: float = math.inf) -> None:
    """Check the trainer's schedulers, see :func:`check_schedule`."""
    for config in trainer.lr_scheduler_configs:
        check_schedule(name, config.scheduler, config.interval, trainer, first, end)


def _planned(trainer: Trainer, interval: str, first: int, end: float) -> float | None:
    """Return how often a scheduler steps from one epoch to another. None if that is unknown."""
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in _callbacks(trainer)):
        return None
    epochs = trainer.max_epochs
    end = min(end, math.inf if epochs is None or epochs < 0 else epochs)
    most = math.inf if trainer.max_steps < 0 else trainer.max_steps
    batches = trainer.num_training_batches
    if math.isinf(batches):  # a loader without length
        return most if interval == "step" and first == 0 and math.isinf(end) else None
    each = max(math.ceil(batches / trainer.accumulate_grad_batches), 1)
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


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]
