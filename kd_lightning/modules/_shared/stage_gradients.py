"""Gradients in a stage that trains some of a module's parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kd_lightning.errors import InputError


def with_all_gradients(module: LightningModule, value: Tensor, trained: Callable[[], Iterable[nn.Parameter]]) -> Tensor:
    """Add 0 times each parameter that the stage does not train: DDP waits for a gradient of every parameter.

    Args:
        module: The module.
        value: A term of the objective, which gives a gradient to all parameters that the stage trains.
        trained: Function that returns these parameters. It is called under DDP alone.
    """
    if module._trainer is None or not isinstance(module.trainer.strategy, DDPStrategy):
        return value
    reached = {id(p) for p in trained()}
    rest = [(p * 0).sum().to(value.dtype) for p in module.parameters() if p.requires_grad and id(p) not in reached]
    return torch.stack([value, *rest]).sum()


def check_first_gradients(student: nn.Module, names: Collection[str]) -> None:
    """Check after a backward pass that the parameters below the guided layers have a gradient, except frozen ones.

    Args:
        student: The student.
        names: Names of the parameters below its guided layers.

    Raises:
        InputError: If none of them has a gradient. If some have none, this warns.
    """
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad and name in names}
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    if not without:
        return
    message = (
        f"hints: {len(without)} of {len(parameters)} parameters below the guided layers got no gradient in the first "
        f"step of stage 1, such as {without[0]}; gradient checkpointing with use_reentrant=True gives none to a block "
        "whose inputs have none (use_reentrant=False works), and neither does a layer that is left out in training"
    )
    if len(without) == len(parameters):
        raise InputError(message)
    rank_zero_warn(message)
