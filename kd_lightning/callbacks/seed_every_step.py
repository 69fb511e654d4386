"""Seed the random generators before each epoch and step, so that a resumed run repeats its random numbers."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning.errors import InputError


class SeedEveryStep(Callback):
    """Seed torch before every training batch from (seed, epoch, batch index, rank).

    Before each epoch, torch, numpy and Python are seeded from (seed, epoch): an order that a sampler draws from them is
    the same on all processes. A checkpoint does not hold the state of the random number generators. With this callback,
    a resumed run has the same dropout masks as an unbroken one, and a DataLoader of PyTorch has the same order and
    augmentation. The command line adds this callback to every run.

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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before each epoch's order is drawn, but for the first epoch's. Seeds torch, numpy and Python."""
        if (key := self._seed_torch(trainer, "epoch")) is not None:
            np.random.seed(key)
            random.seed(key)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Seeds torch."""
        self._seed_torch(trainer, f"{batch_idx} {trainer.global_rank}")

    def _seed_torch(self, trainer: Trainer, place: str) -> int | None:
        """Seed torch for a place in the epoch. Return its seed; None if there is none."""
        if (seed := self._current_seed()) is None:
            return None
        key = zlib.crc32(f"{seed} {trainer.current_epoch} {place}".encode())
        # torch.manual_seed also seeds every accelerator, which takes a tenth of a millisecond where none is in use
        on_cpu = trainer.strategy.root_device.type == "cpu"
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(key)
        return key

    def _current_seed(self) -> str | None:
        return os.environ.get("PL_GLOBAL_SEED") if self.seed is None else str(self.seed)
