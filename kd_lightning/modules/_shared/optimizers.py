"""Build what ``configure_optimizers`` returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.errors import InputError
from kd_lightning.runs.metric_direction import check_direction


def build_optimizers(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    lr_interval: str,
    monitor: str = "val/loss",
) -> OptimizerLRScheduler:
    """Build an optimiser over those of the parameters that require a gradient, and its scheduler.

    Args:
        parameters: The parameters to train.
        optimizer: Called with the parameters.
        lr_scheduler: Called with the optimiser. If None, there is no scheduler.
        lr_interval: ``"epoch"`` or ``"step"``.
        monitor: Metric that ReduceLROnPlateau follows if it has no ``monitor`` itself.

    Raises:
        InputError: If the optimiser or the scheduler refuses its arguments; if ReduceLROnPlateau follows its metric in
            the wrong direction.
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
    config: dict[str, Any] = {"scheduler": scheduler, "interval": lr_interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = getattr(scheduler, "monitor", monitor)
        check_direction("lr_scheduler", config["monitor"], scheduler.mode)
    return {"optimizer": built, "lr_scheduler": config}  # type: ignore[return-value]
