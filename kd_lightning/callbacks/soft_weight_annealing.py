"""Anneal a number of the module over the epochs."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.errors import InputError


class SoftWeightAnnealing(Callback):
    """Move a number of the module from ``start`` to ``end`` over the epochs.

    Nothing is saved: the value follows from the epoch, so a resumed run goes on where it was. Works on any
    LightningModule that has the attribute. The value is charted under the attribute's name. Epochs count from the
    module's ``distill_from_epoch`` where it has one: in a ``HintModule`` all starts with the second stage.

    Args:
        start: The value up to ``begin_epoch``.
        end: The value from ``end_epoch`` on.
        begin_epoch: Where it starts to move.
        end_epoch: Where it arrives; None: the run's last epoch, ``max_epochs - 1``.
        shape: ``"linear"``, ``"cosine"`` (half a wave), or ``"exponential"`` (equal ratios; both ends above 0).
        attribute: What to set; a dotted path such as ``"soft_loss.temperature"`` reaches into submodules.

    Raises:
        InputError: For an unknown shape, ends that the shape cannot join, epochs in the wrong order, a module
            without the attribute, or one whose attribute is no number.
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
        """The value in an epoch; ``last_epoch`` stands in for an ``end_epoch`` of None.

        >>> SoftWeightAnnealing(1.0, 0.0, begin_epoch=2).value(epoch=4, last_epoch=6)
        0.5
        """
        end_epoch = last_epoch if self.end_epoch is None else self.end_epoch
        if epoch < self.begin_epoch:
            return self.start
        if epoch >= end_epoch:
            return self.end
        done = (epoch - self.begin_epoch) / (end_epoch - self.begin_epoch)
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** done)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to anneal, and a last epoch."""
        if stage != "fit":
            return
        name = type(pl_module).__name__
        try:
            value = attrgetter(self.attribute)(pl_module)
        except AttributeError as error:
            raise InputError(f"attribute {self.attribute!r} to anneal: {name} has none of that name") from error
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"attribute {self.attribute!r} of {name} must be a number, got {type(value).__name__}")
        if self.end_epoch is None and (trainer.max_epochs is None or trainer.max_epochs < 0):
            raise InputError("end_epoch must be given where max_epochs is not")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the value; a run resumed in mid-epoch gets no other call before its first step."""
        self._apply(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the value and chart it."""
        pl_module.log(self.attribute, self._apply(trainer, pl_module))

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> float:
        path, _, name = self.attribute.rpartition(".")
        begin = getattr(pl_module, "distill_from_epoch", 0)
        value = self.value(trainer.current_epoch - begin, (trainer.max_epochs or 0) - 1 - begin)
        setattr(attrgetter(path)(pl_module) if path else pl_module, name, value)
        return value
