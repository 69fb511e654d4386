"""Parameters that a teacher froze."""

from __future__ import annotations

from torch import Tensor


def freeze(parameter: Tensor) -> None:
    """Freeze a parameter, and note on it if it was trained before, see :func:`was_trained`."""
    if parameter.requires_grad:
        parameter.requires_grad_(False)
        parameter._is_frozen_by_teacher = True  # type: ignore[attr-defined]


def unfreeze(parameter: Tensor) -> None:
    """Undo :func:`freeze`. A parameter that was frozen before stays frozen."""
    if getattr(parameter, "_is_frozen_by_teacher", False):
        parameter.requires_grad_(True)
        del parameter._is_frozen_by_teacher  # type: ignore[attr-defined]


def was_trained(parameter: Tensor) -> bool:
    """Whether a parameter is trained, or was until a teacher froze it."""
    return parameter.requires_grad or getattr(parameter, "_is_frozen_by_teacher", False)
