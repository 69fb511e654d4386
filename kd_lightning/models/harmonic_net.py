"""A small network that estimates the pitch of a sound from its harmonics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError

_RATE = 16_000
_SAMPLES = 1024
_BINS = 360
_FIRST = 1997.3794084376191
"""Pitch of the first output of CREPE, in cents above 10 Hz."""
_HARMONICS = (1 / 3, 1 / 2, 1, 2, 3, 4, 5, 6, 7, 8)


class HarmonicNet(nn.Module):
    """Three convolutions over the spectrum of 64 ms of sound, with harmonics as channels.

    It is a student for :class:`~kd_lightning.models.Crepe`, with the same inputs and outputs. The spectrum is over the
    logarithm of frequency, 20 cents apart. The channels of a pitch are the spectrum at its frequency and at multiples
    and fractions of it. The spectrum has no weights, so the file of deployed weights does not hold it.

    Source of the channels: Bittner et al., "Deep Salience Representations for F0 Estimation in Polyphonic Music"
    (ISMIR 2017), section 3.1.

    Args:
        width: Channels of each convolution, at least 1.

    Shapes:
        Input (B, 1024): samples at 16 kHz, with mean 0 and standard deviation 1 in each row. Output (B, 360).

    Raises:
        InputError: For a width below 1, or inputs of another shape.

    >>> sum(p.numel() for p in HarmonicNet().parameters())
    5469
    """

    waves: Tensor
    places: Tensor
    exists: Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        shifts = torch.tensor([round(60 * math.log2(harmonic)) for harmonic in _HARMONICS])  # 60 steps are an octave
        lowest = int(shifts.min())
        steps = torch.arange(lowest, _BINS + int(shifts.max()), dtype=torch.float64)
        hertz = 10 * 2 ** ((_FIRST + 20 * steps) / 1200)
        hertz = hertz[hertz < _RATE / 2]
        time = (torch.arange(_SAMPLES, dtype=torch.float64) - _SAMPLES / 2) / _RATE
        angles = 2 * math.pi * time.unsqueeze(1) * hertz
        window = torch.hann_window(_SAMPLES, dtype=torch.float64).unsqueeze(1) / _SAMPLES
        places = torch.arange(_BINS) + shifts.unsqueeze(1) - lowest
        self.register_buffer("waves", (window * torch.cat([angles.cos(), angles.sin()], 1)).float(), persistent=False)
        self.register_buffer("places", places.clamp(max=len(hertz) - 1), persistent=False)
        self.register_buffer("exists", (places < len(hertz)).float(), persistent=False)
        self.norm = nn.BatchNorm1d(len(shifts))
        self.conv1 = _block(len(shifts), width, 5)
        self.conv2 = _block(width, width, 9)
        self.context = nn.Linear(2 * width, width)
        self.conv3 = _block(width, width, 5)
        self.last = nn.Conv1d(width, 1, 5, padding=2)
        self.bias = nn.Parameter(torch.full((_BINS,), -4.0))  # few pitches are likely

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 360)."""
        if x.ndim != 2 or x.shape[1] != _SAMPLES:
            raise InputError(f"inputs must be (B, {_SAMPLES}), got {[*x.shape]}")
        x = self.conv2(self.conv1(self.norm(self.spectrum(x)[:, self.places] * self.exists)))
        x = x + self.context(torch.cat([x.amax(dim=2), x.mean(dim=2)], dim=1)).unsqueeze(2)
        logits: Tensor = self.last(self.conv3(x)).squeeze(1) + self.bias
        return logits

    def spectrum(self, x: Tensor) -> Tensor:
        """Return the logarithm of the power spectrum (B, F), at frequencies 20 cents apart below 8 kHz."""
        real, imaginary = (x @ self.waves).chunk(2, dim=1)
        return torch.log(real.square() + imaginary.square() + 1e-6)


def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.ReLU())
