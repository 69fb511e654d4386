"""Calibrate the activation ranges of a quantised network before its first step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from kd_lightning.batch import Batch, unpack
from kd_lightning.inputs import call, map_inputs
from kd_lightning.quantization.calibration import activation_ranges, calibrate, is_calibrated
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import STUDENT, find_network


class ActivationCalibration(Callback):
    """Calibrate a quantised network on the first training batch, unless it is calibrated already.

    Every checkpoint holds the ranges, so a resumed run continues exactly. With several processes, a range is the
    largest magnitude over the batches of all processes. A network without quantised activations stays as it is. Works
    on any LightningModule: where it has no ``unpack(batch)``, the network is calibrated on what the first training step
    calls it with. The command line adds this callback to every fit of a module with a student.

    Args:
        network: Dotted path of the network in the module; "" for the module itself.

    Raises:
        InputError: If the module does not have the network.
    """

    def __init__(self, network: str = STUDENT) -> None:
        self.network = network
        self._due = False
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the strategy leaves the weights whole."""
        require_whole_weights(trainer, "ActivationCalibration")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of training, after a checkpoint is loaded. Checks whether the network needs calibration."""
        self._remove_hook()
        self._due = not is_calibrated(find_network(pl_module, self.network, "ActivationCalibration"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Calibrates the network on the first one, if it needs it."""
        if not self._due:
            return
        self._due = False
        network = find_network(pl_module, self.network, "ActivationCalibration")
        if network is not pl_module and not callable(getattr(pl_module, "unpack", None)):
            hook = partial(self._calibrate_on_call, trainer)
            self._handle = network.register_forward_pre_hook(hook, with_kwargs=True)
            return
        with trainer.precision_plugin.forward_context():
            calibrate(network, [unpack(pl_module, batch)], getattr(pl_module, "call", call))
        _reduce_ranges(trainer, network)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Removes the hook of a network that was never called."""
        self._remove_hook()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _calibrate_on_call(
        self, trainer: Trainer, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Runs in the first training step, when it calls the network."""
        self._remove_hook()
        args, kwargs = map_inputs(torch.clone, (args, kwargs))  # the network may change them in place
        calibrate(network, [Batch(None)], lambda network, _: network(*args, **kwargs))
        _reduce_ranges(trainer, network)

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def _reduce_ranges(trainer: Trainer, network: nn.Module) -> None:
    with torch.no_grad():
        for value in activation_ranges(network).values():
            value.copy_(trainer.strategy.reduce(value.detach().clone(), reduce_op="max"))
