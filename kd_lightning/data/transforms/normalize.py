"""Normalise a batch of images by the mean and std of each channel, in torchvision v2's name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.buffers import empty_like
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError


class Normalize(BatchTransform):
    """Convert images to float32, subtract the mean of each channel and divide by its std.

    It does what torchvision's ``ToDtype(float32, scale=True)`` and ``Normalize`` do, in 2 passes over the pixels.
    Whole numbers are scaled to [0, 1], floats are not.

    Args:
        mean: Mean of each channel of images in [0, 1], or one number for all.
        std: Standard deviation of each channel, not 0, or one number for all.

    Raises:
        InputError: If ``mean`` and ``std`` have different lengths, a number is not finite, or a std is 0. In a call:
            if the images have another number of channels.
    """

    is_random = False
    moves_pixels = False

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]
        if not self.mean or len(self.mean) != len(self.std) or not all(map(math.isfinite, self.mean + self.std)):
            raise InputError(f"mean and std must have a finite number for each channel, got {mean} and {std}")
        if not all(self.std):
            raise InputError(f"std must not be 0, got {std}")

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return new images (B, C, H, W), float32."""
        channels = images.shape[1]
        if len(self.mean) not in (1, channels):
            raise InputError(f"images must have {len(self.mean)} channels, as mean and std have, got {channels}")
        if images.dtype != torch.uint8:
            result: Tensor = functional.normalize(functional.to_dtype(images, scale=True), self.mean, self.std)
            return result
        result = empty_like(images, torch.float32).copy_(images)
        for channel in range(channels):
            mean, std = (values[channel % len(values)] for values in (self.mean, self.std))
            part = result[:, channel]
            # x / (255 std) - mean / std in one pass, with one rounding
            torch.add(torch.tensor(-mean / std), part, alpha=1 / (255 * std), out=part)
        return result
