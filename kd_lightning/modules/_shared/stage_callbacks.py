"""Lightning's callbacks in a fit of several stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning.errors import InputError

_REPLACED = ("_should_skip_check", "on_exception", "teardown")


def check_monitors(callbacks: Sequence[EarlyStopping], part: str, advice: str) -> None:
    """Raise InputError if one of the callbacks monitors a metric whose name has a part that a stage alone logs."""
    for callback in callbacks:
        monitor = str(getattr(callback, "monitor", ""))
        if part in monitor:
            raise InputError(f"EarlyStopping on {monitor} would end the run; {advice}")


def pause_early_stopping(callbacks: Sequence[EarlyStopping], is_paused: Callable[[Trainer], bool]) -> None:
    """Make EarlyStopping skip its checks while ``is_paused(trainer)``, until the fit ends.

    Methods of the callbacks are replaced. Each callback restores them in its own ``teardown`` or ``on_exception``: a
    LightningModule has no hook that Lightning calls after an exception.

    Args:
        callbacks: Those of the trainer, in the setup of a fit.
        is_paused: Should be False for other trainers than the module's, in case ``on_exception`` was never reached.
    """
    for callback in callbacks:
        _pause(callback, is_paused)


def _pause(callback: EarlyStopping, is_paused: Callable[[Trainer], bool]) -> None:
    attributes = vars(callback)
    before = {name: attributes[name] for name in _REPLACED if name in attributes}
    skip, on_exception, teardown = (getattr(callback, name) for name in _REPLACED)

    def restore() -> None:
        for name in _REPLACED:
            attributes.pop(name, None)
        attributes.update(before)

    def restore_and(hook: Callable[..., Any]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            restore()
            hook(*args, **kwargs)

        return run

    attributes["_should_skip_check"] = lambda trainer: is_paused(trainer) or skip(trainer)
    attributes["on_exception"] = restore_and(on_exception)
    attributes["teardown"] = restore_and(teardown)


def reset_best(callbacks: Sequence[Any]) -> None:
    """Make each ModelCheckpoint search for the best checkpoint anew, since metrics of two stages do not compare."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = None
            callback.kth_value = None  # type: ignore[assignment]  # its initial value
