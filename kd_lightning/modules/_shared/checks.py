"""Checks of values that several modules share."""

from __future__ import annotations

from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of the allowed ones."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_soft_weight(soft_weight: float) -> None:
    """Raise InputError unless ``soft_weight`` lies in [0, 1]."""
    if not 0.0 <= soft_weight <= 1.0:
        raise InputError(f"soft_weight must lie in [0, 1], got {soft_weight}")


def check_same_teacher(name: str, teacher: Teacher, fingerprint: str) -> None:
    """Raise InputError unless a checkpoint's fingerprint is the teacher's.

    Args:
        name: Name of the teacher in the message.
        teacher: The teacher of this run.
        fingerprint: The fingerprint in the checkpoint.
    """
    if teacher.fingerprint() != fingerprint:
        raise InputError(
            f"{name}: the checkpoint was trained with another teacher (fingerprint {fingerprint[:12]}..., this one has "
            f"{teacher.fingerprint()[:12]}...); resume with the same weights, preprocess and classes"
        )
