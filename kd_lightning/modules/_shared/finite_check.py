"""Stop a training whose loss is not finite before it overwrites a good checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError

_MOST_RECORDED = 1000


class FiniteCheck:
    """Finds the first step at which a term was not finite.

    Recording does not synchronize with the device. Only a check does, one of which is made every 1000 records.

    Args:
        prefix: Text before the names of terms in messages.
    """

    def __init__(self, prefix: str = "train/") -> None:
        self._prefix = prefix
        self._recorded: list[tuple[int, str, Tensor]] = []
        self._bad: tuple[int, str] | None = None  # step and term

    def record(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Record the terms of a step."""
        self._recorded += [(step, name, value.detach()) for name, value in terms.items()]
        if len(self._recorded) > _MOST_RECORDED:
            self._find_bad()

    def check(self, weights: Mapping[str, Any] | None = None) -> None:
        """Raise InputError if a recorded term or one of the given weights is not finite."""
        self._find_bad()
        advice = "; lower the learning rate, clip gradients (trainer.gradient_clip_val) or check the data"
        if self._bad is not None:
            step, name = self._bad
            raise InputError(f"{self._prefix}{name} is not a finite number at step {step}{advice}")
        for name, tensor in (weights or {}).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(
                    f"weights {name} hold numbers that are not finite, so no checkpoint is written{advice}"
                )

    def _find_bad(self) -> None:
        recorded, self._recorded = self._recorded, []
        if recorded and self._bad is None:
            finite = torch.stack([value.sum() if value.ndim else value for _, _, value in recorded]).isfinite().tolist()
            self._bad = next(((s, n) for (s, n, _), fine in zip(recorded, finite, strict=True) if not fine), None)
