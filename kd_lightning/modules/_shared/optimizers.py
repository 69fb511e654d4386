"""Build what ``configure_optimizers`` returns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.errors import InputError
from kd_lightning.modules._shared.parameter_groups import group_parameters
from kd_lightning.modules._shared.schedules import await_length, run_length
from kd_lightning.runs.metric_direction import check_direction
from kd_lightning.schedules import build_scheduler, takes_length

if TYPE_CHECKING:
    from kd_lightning.modules._shared.student_module import StudentModule


def build_optimizer(
    module: StudentModule,
    parameters: Iterable[nn.Parameter],
    name: str = "optimizer",
    prefix: str = "",
) -> Optimizer:
    """Build an optimiser over those of the parameters that require a gradient.

    Args:
        module: The module that trains them. Its ``weight_decay_exclude_1d`` groups them.
        parameters: The parameters to train.
        name: The module's attribute that is called with the parameters, or with groups of them.
        prefix: What the names of the groups begin with.

    Raises:
        InputError: If the optimiser refuses its arguments, or has no weight decay, but ``weight_decay_exclude_1d``.
    """
    optimizer: OptimizerCallable = getattr(module, name)
    trained = [p for p in parameters if p.requires_grad]
    try:
        if not module.weight_decay_exclude_1d:
            return optimizer(trained)
        built = optimizer(group_parameters(module, trained, prefix))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error
    if "weight_decay" not in built.defaults:
        raise InputError(f"weight_decay_exclude_1d must be false, since {type(built).__name__} has no weight_decay")
    if not any(group["weight_decay"] for group in built.param_groups):
        rank_zero_warn(f"weight_decay_exclude_1d changes nothing: {type(built).__name__} of {name} has weight_decay 0")
    return built


def build_optimizers(
    module: StudentModule,
    optimizer: Optimizer,
    name: str = "lr_scheduler",
    *,
    monitor: str = "val/loss",
    first: int = 0,
    end: float = math.inf,
) -> OptimizerLRScheduler:
    """Build the scheduler of an optimiser, and return both as Lightning takes them.

    Args:
        module: The module. Its ``lr_interval`` is ``"epoch"`` or ``"step"``.
        optimizer: The optimiser.
        name: The module's attribute that is called with the optimiser. If it is None, there is no scheduler. If it
            leaves out its length, this is the length of the run.
        monitor: Metric that ReduceLROnPlateau follows if it has no ``monitor`` itself.
        first: Epoch in which the schedule starts.
        end: Epoch before which the schedule ends at the latest.

    Raises:
        InputError: If the scheduler refuses its arguments; if the length of the run is needed and not known; if
            ReduceLROnPlateau follows its metric in the wrong direction.
    """
    lr_scheduler: LRSchedulerCallable | None = getattr(module, name)
    if lr_scheduler is None:
        return optimizer
    trainer, interval = module._trainer, module.lr_interval
    takes = takes_length(lr_scheduler)
    length = run_length(name, trainer, interval, first, end) if takes else None
    try:
        scheduler = build_scheduler(lr_scheduler, optimizer, length)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{name}: {error}") from error
    if takes:
        await_length(name, scheduler, module)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = getattr(scheduler, "monitor", monitor)
        check_direction(name, config["monitor"], scheduler.mode)
    return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]
