"""Stop a training whose loss is not finite before it overwrites a good checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError


class FiniteCheck:
    """Records the first step at which each term was not finite. Recording does not synchronize with the device."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def record(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Record the terms of a step."""
        for name, value in terms.items():
            if value.device.type == "cpu" and value.isfinite().all():  # on the CPU this costs less than recording
                continue
            first = self._first.get(name)
            first = torch.full((), -1, device=value.device) if first is None else first
            bad = ~value.detach().isfinite().all()
            self._first[name] = torch.where((first < 0) & bad, step, first)

    def check(self, weights: Mapping[str, Any] | None = None) -> None:
        """Raise InputError if a recorded term or one of the given weights is not finite."""
        bad = {name: int(first) for name, first in self._first.items() if first >= 0}
        advice = "; lower the learning rate, clip gradients (trainer.gradient_clip_val) or check the data"
        if bad:
            name, step = min(bad.items(), key=lambda item: item[1])
            raise InputError(f"train/{name} is not a finite number at step {step}{advice}")
        for name, tensor in (weights or {}).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(
                    f"weights {name} hold numbers that are not finite, so no checkpoint is written{advice}"
                )
