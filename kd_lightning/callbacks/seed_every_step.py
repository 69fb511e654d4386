"""Seed torch before each training step, so that a resumed run repeats its random numbers."""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning.errors import InputError


class SeedEveryStep(Callback):
    """Seed torch before every training batch from (seed, epoch, batch index, rank).

    A checkpoint does not hold the state of the random number generators. With this callback, a resumed run has the
    same dropout masks as an unbroken one. The command line adds this callback to every run.

    Args:
        seed: The seed. Default: None, which means the seed of ``seed_everything``; if that is not set either, the
            callback does nothing.

    Raises:
        InputError: When a fit resumes with another seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, for a checkpoint."""
        return {"seed": self._current_seed()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs when a checkpoint is loaded. In a fit, raises InputError if its seed is another one."""
        before = checkpoint["callbacks"].get(self.state_key, {}).get("seed")
        now = self._current_seed()
        if trainer.state.fn == TrainerFn.FITTING and before != now and None not in (before, now):
            raise InputError(
                f"seed_everything: the checkpoint was trained with {before}, got {now}; resume with the same, or start "
                "a new run"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Seeds torch."""
        if (seed := self._current_seed()) is not None:
            key = f"{seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
            # torch.manual_seed also seeds every accelerator, which takes a tenth of a millisecond where none is in use
            on_cpu = trainer.strategy.root_device.type == "cpu"
            (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(zlib.crc32(key.encode()))

    def _current_seed(self) -> str | None:
        return os.environ.get("PL_GLOBAL_SEED") if self.seed is None else str(self.seed)
