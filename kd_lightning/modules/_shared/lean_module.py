"""A LightningModule whose hooks take less time in each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from kd_lightning.errors import InputError
from kd_lightning.modules._shared.epoch_means import EpochMeans
from kd_lightning.modules._shared.hard_loss import must_synchronize
from kd_lightning.runs.weights import check_fit

_PLAIN = {str, float, int, bool, type(None)}


class LeanModule(LightningModule):
    """A LightningModule that does the same as Lightning's, in less time: a small network's step is a few milliseconds.

    Values of training are logged as means over the epoch, at its end. Subclasses may override all hooks as usual.
    """

    def __init__(self) -> None:
        super().__init__()
        self._epoch_means = EpochMeans()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Lightning writes the name of every hook that it calls, 40 times a step. nn.Module takes ten times as long for
        it, since a value may be a parameter.
        """
        if type(value) in _PLAIN and name in self.__dict__:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights. Raises InputError, in one line, if they do not fit."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            try:
                check_fit(state_dict, self.state_dict(), f"the weights do not fit {type(self).__name__}")
            except InputError as explained:
                raise explained from error
            raise

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Runs before each backward pass. Does what ``zero_grad()`` of torch does, without its profiler."""
        if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Runs before each optimiser step. Clips gradients, if the trainer's settings ask for it."""
        if gradient_clip_val or self.trainer.gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Means over an epoch.

    def _may_synchronize(self, tensor: Tensor) -> bool:
        """Whether reading a value costs little: on the CPU, and where the logger reads values anyway."""
        return not must_synchronize(tensor) or self._trainer is None or self._is_logging_step()

    def _is_logging_step(self) -> bool:
        """Whether a logger logs after this step, or the epoch ends with it."""
        trainer: Any = self._trainer
        if trainer.is_last_batch:
            return True
        step, last, every = trainer.global_step + 1, trainer.max_steps, trainer.log_every_n_steps
        return bool(-1 < last <= step or (every > 0 and step % every == 0))

    def _record_mean(self, name: str, value: Tensor | float, rows: float) -> None:
        """Add a value to the epoch's mean of this name, with ``rows`` as its weight."""
        self._epoch_means.add(name, value, rows)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Runs after each training batch. Logs the epoch's means after the last, before callbacks read them."""
        self._log_means_of_whole_epoch()

    def on_train_epoch_end(self) -> None:
        """Runs at the end of each training epoch. Logs the epoch's means if it ended before its last batch."""
        self._epoch_means.log(self)

    def _log_means_of_whole_epoch(self) -> None:
        trainer: Any = self._trainer
        if trainer.is_last_batch or trainer.should_stop or -1 < trainer.max_steps <= trainer.global_step:
            self._epoch_means.log(self)
