"""Random numbers that a resumed run draws again."""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SeedEveryStep(Callback):
    """Seed torch before every training batch from (seed, epoch, batch, rank).

    A checkpoint holds no state of the random generators. With this, dropout in a resumed run falls as it would have
    without the interruption. The command line adds it by itself.

    Args:
        seed: None takes that of ``seed_everything``; without either, nothing is done.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed this step."""
        seed = os.environ.get("PL_GLOBAL_SEED") if self.seed is None else self.seed
        if seed is not None:
            key = f"{seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
            torch.manual_seed(zlib.crc32(key.encode()))
