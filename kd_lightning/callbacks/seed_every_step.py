"""Seed torch before each training step, so that a resumed run repeats its random numbers."""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SeedEveryStep(Callback):
    """Seed torch before every training batch from (seed, epoch, batch index, rank).

    A checkpoint does not hold the state of the random number generators. With this callback, a resumed run has the
    same dropout masks as an unbroken one. The command line adds this callback to every run.

    Args:
        seed: The seed. Default: None, which means the seed of ``seed_everything``; if that is not set either, the
            callback does nothing.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Seeds torch."""
        seed = os.environ.get("PL_GLOBAL_SEED") if self.seed is None else self.seed
        if seed is not None:
            key = f"{seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
            torch.manual_seed(zlib.crc32(key.encode()))
