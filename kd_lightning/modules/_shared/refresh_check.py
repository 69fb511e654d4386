"""A check of the callback that makes a module's refreshed pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kd_lightning.errors import InputError

_NAME = "PseudoLabelRefresh"


def check_refresh(callbacks: Sequence[Any], ema: nn.Module | None, teacher: nn.Module | None) -> None:
    """Raise InputError unless a callback makes pseudo-labels, by the networks that the module has for it.

    Args:
        callbacks: The trainer's callbacks.
        ema: The running average of the student, if there is one.
        teacher: The teacher, if there is one.
    """
    # by name: the rooms of modules and callbacks do not import each other
    refreshes = [one for one in callbacks if any(kind.__name__ == _NAME for kind in type(one).__mro__)]
    if not refreshes:
        raise InputError("pseudo_labels: refreshed needs the callback PseudoLabelRefresh; add it to trainer.callbacks")
    sources = [one.source for one in refreshes]
    for option, network, source in (("ema_decay", ema, "ema"), ("teacher", teacher, "teacher")):
        if network is not None and source not in sources:
            found = sources[0] if isinstance(sources[0], str) else type(sources[0]).__name__
            raise InputError(
                f"{option} makes no pseudo-labels: PseudoLabelRefresh has source: {found}; set source: {source}, or "
                f"leave out {option}"
            )
