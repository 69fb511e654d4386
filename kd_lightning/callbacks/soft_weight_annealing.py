"""Anneal a weight, a temperature or another number of the module over the epochs."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.errors import InputError


class SoftWeightAnnealing(Callback):
    """Change a number of the module from ``start`` to ``end`` over the epochs.

    The epoch alone decides the value, so a resumed run continues exactly and nothing is saved. Works on any
    LightningModule that has the attribute. Logs the value under the attribute's name. If the module has a
    ``distill_from_epoch``, epochs count from there: in a ``HintModule`` the annealing starts with the second stage.

    Args:
        start: The value up to ``begin_epoch``.
        end: The value from ``end_epoch`` on.
        begin_epoch: The last epoch with the value ``start``, at least 0.
        end_epoch: The first epoch with the value ``end``, at least ``begin_epoch``. Default: None, which means the
            run's last epoch, ``max_epochs - 1``.
        shape: ``"linear"``, ``"cosine"`` (half a wave), or ``"exponential"`` (equal ratios; ``start`` and ``end``
            must be above 0).
        attribute: Name of the number. A dotted path such as ``"soft_loss.temperature"`` names one of a submodule.

    Raises:
        InputError: If the shape is unknown, ``start`` or ``end`` does not fit the shape, the epochs are in the wrong
            order, or the module has no such attribute or one that is not a number.
    """

    def __init__(
        self,
        start: float,
        end: float,
        begin_epoch: int = 0,
        end_epoch: int | None = None,
        shape: Literal["linear", "cosine", "exponential"] = "linear",
        attribute: str = "soft_weight",
    ) -> None:
        if shape not in ("linear", "cosine", "exponential"):
            raise InputError(f"shape must be one of linear, cosine, exponential, got {shape!r}")
        if shape == "exponential" and min(start, end) <= 0:
            raise InputError(f"start and end must be above 0 for the exponential shape, got {start} and {end}")
        if begin_epoch < 0 or (end_epoch is not None and end_epoch < begin_epoch):
            raise InputError(f"epochs must be 0 <= begin_epoch <= end_epoch, got {begin_epoch} and {end_epoch}")
        self.start = start
        self.end = end
        self.begin_epoch = begin_epoch
        self.end_epoch = end_epoch
        self.shape = shape
        self.attribute = attribute

    def value(self, epoch: int, last_epoch: int) -> float:
        """Return the value in an epoch. If ``end_epoch`` is None, ``last_epoch`` takes its place.

        >>> SoftWeightAnnealing(1.0, 0.0, begin_epoch=2).value(epoch=4, last_epoch=6)
        0.5
        """
        end_epoch = last_epoch if self.end_epoch is None else self.end_epoch
        if epoch < self.begin_epoch:
            return self.start
        if epoch >= end_epoch:
            return self.end
        progress = (epoch - self.begin_epoch) / (end_epoch - self.begin_epoch)
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** progress)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Before a fit, checks the attribute and the last epoch."""
        if stage != "fit":
            return
        name = type(pl_module).__name__
        try:
            value = attrgetter(self.attribute)(pl_module)
        except AttributeError as error:
            raise InputError(f"attribute {self.attribute!r} to anneal: {name} has no attribute of that name") from error
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"attribute {self.attribute!r} of {name} must be a number, got {type(value).__name__}")
        if self.end_epoch is None and (trainer.max_epochs is None or trainer.max_epochs < 0):
            raise InputError(f"end_epoch must be set if max_epochs is not, got max_epochs {trainer.max_epochs}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of training. Sets the value.

        A run resumed within an epoch calls no later hook of this callback before its first step.
        """
        self._set_value(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of each training epoch. Sets the value and logs it."""
        pl_module.log(self.attribute, self._set_value(trainer, pl_module))

    def _set_value(self, trainer: Trainer, pl_module: LightningModule) -> float:
        path, _, name = self.attribute.rpartition(".")
        first_epoch = getattr(pl_module, "distill_from_epoch", 0)
        value = self.value(trainer.current_epoch - first_epoch, (trainer.max_epochs or 0) - 1 - first_epoch)
        setattr(attrgetter(path)(pl_module) if path else pl_module, name, value)
        return value
