"""What a training in stages means to Lightning's callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def hold_early_stopping(callbacks: Sequence[Any], held: Callable[[], bool]) -> None:
    """Let early stopping look at nothing while ``held()``."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            callback._should_skip_check = partial(_skip, callback, held)  # type: ignore[method-assign]


def _skip(callback: EarlyStopping, held: Callable[[], bool], trainer: Trainer) -> bool:
    return held() or type(callback)._should_skip_check(callback, trainer)


def forget_best(callbacks: Sequence[Any]) -> None:
    """Have checkpoints look for the best anew; the figures of two stages do not compare."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = None
            callback.kth_value = None  # type: ignore[assignment]  # as it was made
