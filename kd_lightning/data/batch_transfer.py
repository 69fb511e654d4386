"""The hooks of batch transfer, outside of a fit: they may change what a network gets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""The hooks of modules and datamodules that change a loaded batch, in their order."""


def own_hooks(module: Any) -> dict[str, Callable[..., Any]]:
    """Return the hooks of batch transfer that a module has of its own, by name."""
    return {name: getattr(module, name) for name in HOOKS if is_overridden(name, module)}


def read_by(data: Any, hooks: Mapping[str, Callable[..., Any]], unpack: Callable[[Any], Batch]) -> Any:
    """Return the data with batches as a module gets them in a Trainer.

    Args:
        data: A datamodule, or a module with its own loaders. It stays as it is.
        hooks: The module's own hooks, see :func:`own_hooks`. They count where the datamodule has none.
        unpack: From a batch to a Batch.
    """
    data = copy(data)
    for name, hook in hooks.items():
        if not is_overridden(name, data):
            setattr(data, name, hook)
    data.unpack = unpack
    return data


def transfer(data: Any, batch: Any, device: torch.device, *, training: bool = False) -> Any:
    """Return a loaded batch on a device, as the hooks of batch transfer change it, in the order of a Trainer.

    Args:
        data: The datamodule, or the module, whose hooks they are, see :func:`read_by`.
        batch: The batch.
        device: The device.
        training: Whether it is a batch of a training step, for hooks that ask their trainer. Default: False, which
            means one of a validation step.

    Raises:
        InputError: If a hook fails.
    """
    for name in HOOKS:
        hook = getattr(data, name)
        place = (device,) if name == "transfer_batch_to_device" else ()
        if str(getattr(hook, "__module__", "")).startswith(("lightning.", "pytorch_lightning.")):
            batch = hook(batch, *place, 0)
            continue
        try:
            with _attached(getattr(hook, "__self__", data), training):
                batch = hook(batch, *place, 0)
        except InputError:
            raise
        except Exception as error:  # of a hook of the user
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"{name} fails outside of a fit: {reason}") from error
    return batch


@contextmanager
def _attached(owner: Any, training: bool) -> Iterator[None]:
    """Attach a trainer to the owner of a hook that has none: such hooks ask ``self.trainer.training``."""
    name = "_trainer" if isinstance(owner, LightningModule) else "trainer"
    if getattr(owner, name, None) is not None:
        yield
        return
    setattr(owner, name, _trainer(training))
    try:
        yield
    finally:
        setattr(owner, name, None)


@cache
def _trainer(training: bool) -> Trainer:
    """Return a trainer that seems to be in a training or a validation step."""
    exact = torch.are_deterministic_algorithms_enabled()  # a Trainer sets it
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a GPU that it does not use
            options: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
            trainer = Trainer(accelerator="cpu", devices=1, deterministic=exact, enable_model_summary=False, **options)
    finally:
        log.setLevel(level)
    trainer.state.fn, trainer.state.status = TrainerFn.FITTING, TrainerStatus.RUNNING
    trainer.state.stage = RunningStage.TRAINING if training else RunningStage.VALIDATING
    return trainer
