"""Calibrate the activation ranges of a quantised student before its first step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.quantization.calibration import activation_ranges, calibrate, is_calibrated
from kd_lightning.runs.strategies import require_whole_weights


class ActivationCalibration(Callback):
    """Calibrate a quantised student on the first training batch, unless it is calibrated already.

    Every checkpoint holds the ranges, so a resumed run continues exactly. With several processes, a range is the
    largest magnitude over the batches of all processes. A student without quantised activations stays as it is. Works
    on any LightningModule with a ``student``. The command line adds this callback to every fit.

    Raises:
        InputError: If the module has no ``student``.
    """

    def __init__(self) -> None:
        self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the strategy leaves the weights whole."""
        require_whole_weights(trainer, "ActivationCalibration")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of training, after a checkpoint is loaded. Checks whether the student needs calibration."""
        student = getattr(pl_module, "student", None)
        if not isinstance(student, nn.Module):
            name = type(pl_module).__name__
            raise InputError(f"ActivationCalibration needs a module with a student, {name} has none")
        self._due = not is_calibrated(student)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Calibrates the student on the first one, if it needs it."""
        if not self._due:
            return
        self._due = False
        student: nn.Module = pl_module.student  # type: ignore[assignment]
        with trainer.precision_plugin.forward_context():
            calibrate(student, [batch])
        with torch.no_grad():
            for value in activation_ranges(student).values():
                value.copy_(trainer.strategy.reduce(value.detach().clone(), reduce_op="max"))
