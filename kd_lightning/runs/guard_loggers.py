"""Loggers whose errors do not end a training."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

_METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")
_earlier: list[Any] = []  # loggers of the last trainer of this process


def guard_loggers(trainer: Trainer) -> None:
    """Make the errors of a trainer's loggers warnings: a server that is away, a full disk.

    Each method of a logger warns at its first error, and is called again the next time.

    Weights & Biases has one open run in a process. If a trainer that was guarded before has opened it, it is finished
    first, so that the new trainer's logger starts its own run, with its own folder. A run that the calling program has
    opened (a sweep) stays open, and is shared.
    """
    for logger in _earlier:
        if callable(finish := getattr(getattr(logger, "_experiment", None), "finish", None)):
            try:
                finish()
            except Exception as error:
                _warn(logger, "finish", error)
    _earlier.clear()
    opened_outside = getattr(sys.modules.get("wandb"), "run", None) is not None
    for logger in trainer.loggers:
        if not opened_outside and getattr(logger, "_experiment", None) is None:
            _earlier.append(logger)
        for name in _METHODS:
            if hasattr(type(logger), name):
                setattr(logger, name, _Guard(logger, name))


class _Guard:
    """Calls a method of a logger. An error becomes a warning. An object, since loggers are pickled."""

    def __init__(self, logger: Any, name: str) -> None:
        self.logger = logger
        self.name = name
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(type(self.logger), self.name)(self.logger, *args, **kwargs)
        except Exception as error:
            if not self.warned:
                self.warned = True
                _warn(self.logger, self.name, error)
            return None


def _warn(logger: Any, name: str, error: Exception) -> None:
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    reasons = (f"{type(one).__name__}: {next(iter(str(one).strip().splitlines()), '')}" for one in causes)
    rank_zero_warn(
        f"{type(logger).__name__}.{name} failed, and the run goes on; later errors of it are not reported: "
        f"{'; because of '.join(reasons)}"
    )
