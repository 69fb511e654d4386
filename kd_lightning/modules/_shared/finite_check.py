"""Stop a training whose loss is no number before it spoils what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError


class FiniteCheck:
    """Notes the step at which each term first was no finite number; noting does not wait for the device."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def note(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Look at the terms of a step."""
        for name, value in terms.items():
            if value.device.type == "cpu" and value.isfinite().all():  # here, looking costs less than noting
                continue
            first = self._first.get(name)
            first = torch.full((), -1, device=value.device) if first is None else first
            bad = ~value.detach().isfinite().all()
            self._first[name] = torch.where((first < 0) & bad, step, first)

    def check(self, weights: Mapping[str, Any] | None = None) -> None:
        """Raise InputError if a term was not finite, or if any of the weights is not."""
        bad = {name: int(first) for name, first in self._first.items() if first >= 0}
        advice = "; lower the learning rate, clip gradients (trainer.gradient_clip_val) or look at the data"
        if bad:
            name, step = min(bad.items(), key=lambda item: item[1])
            raise InputError(f"train/{name} is not a finite number at step {step}{advice}")
        for name, tensor in (weights or {}).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(
                    f"weights {name} hold numbers that are not finite, so no checkpoint is written{advice}"
                )
