"""Ranges of activations before the first step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.quantization.calibration import activation_ranges, calibrate, is_calibrated


class ActivationCalibration(Callback):
    """Calibrate a quantised student on the first training batch, unless it is calibrated already.

    The ranges then lie in every checkpoint, so that a resumed run goes on exactly. Several processes take the largest
    magnitude of all their batches. A student without quantised activations is left alone. Works on any
    LightningModule with a ``student``; the command line adds it by itself.

    Raises:
        InputError: If the module has no ``student``.
    """

    def __init__(self) -> None:
        self._due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether there is something to do; a resumed run has its ranges by now."""
        student = getattr(pl_module, "student", None)
        if not isinstance(student, nn.Module):
            name = type(pl_module).__name__
            raise InputError(f"ActivationCalibration needs a module with a student, {name} has none")
        self._due = not is_calibrated(student)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Calibrate."""
        if not self._due:
            return
        self._due = False
        student: nn.Module = pl_module.student  # type: ignore[assignment]
        with trainer.precision_plugin.forward_context():
            calibrate(student, [batch])
        with torch.no_grad():
            for value in activation_ranges(student).values():
                value.copy_(trainer.strategy.reduce(value.detach().clone(), reduce_op="max"))
