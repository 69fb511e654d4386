"""Strategies of the trainer that shard the weights of a module."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from kd_lightning.errors import InputError


def require_whole_weights(trainer: Trainer, name: str) -> None:
    """Check that each process has all weights. Call it in ``setup``, before the strategy shards them.

    Args:
        trainer: The trainer.
        name: What reads or writes weights, such as the name of a callback.

    Raises:
        InputError: If the trainer's strategy shards the weights.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise InputError(
            f"trainer.strategy: {type(trainer.strategy).__name__} shards the weights, but {name} needs whole ones; "
            "allowed: auto, ddp"
        )
