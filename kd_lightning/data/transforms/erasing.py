"""Erase a random rectangle of each image of a batch, in torchvision v2's name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.buffers import empty_like
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError

_TRIES = 10


class RandomErasing(BatchTransform):
    """Set the pixels of a random rectangle of each image to a value (Zhong et al. 2020, arXiv:1708.04896).

    The first of 10 tries that is smaller than the image counts, as with torchvision. Without one the image stays.
    Masks stay as they are, as with torchvision: the network learns to fill in what it does not see.

    Args:
        p: Probability, 0 to 1.
        scale: Lowest and highest area of the rectangle as a share of the image's, 0 to 1.
        ratio: Lowest and highest height over width, above 0.
        value: New value of the pixels in the range of the images: one number, or one for each channel, or ``random``
            for normally distributed values (mean 0, std 1) of float images.

    Raises:
        InputError: If a value is out of range. In a call: if ``value`` does not fit the images.
    """

    moves_pixels = False

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float | Sequence[float] | Literal["random"] = 0,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"p must be 0 to 1, got {p}")
        if len(scale) != 2 or not 0 <= scale[0] <= scale[1] <= 1:
            raise InputError(f"scale must be lowest and highest share of the area, from 0 to 1, got {scale}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
            raise InputError(f"ratio must be lowest and highest height over width, above 0, got {ratio}")
        values = [*value] if isinstance(value, Sequence) and value != "random" else [0 if value == "random" else value]
        if not values or not all(isinstance(number, Real) for number in values):
            raise InputError(f"value must be a number, one for each channel, or random, got {value}")
        self.p = p
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.value = value

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return new images (B, C, H, W) of the same type."""
        place = self.places(images.shape[2], images.shape[3], draws)
        if self.value == "random":
            if not images.is_floating_point():
                raise InputError(f"value random needs float images, got {images.dtype}")
            return erase(images, place, draws.stream(1).normal(images.shape[1:]).to(images))
        values = [*self.value] if isinstance(self.value, Sequence) else [self.value]
        if len(values) not in (1, images.shape[1]):
            raise InputError(f"value must be one number, or {images.shape[1]} for as many channels, got {self.value}")
        if images.dtype == torch.uint8 and not all(0 <= number <= 255 for number in values):
            raise InputError(f"value must be 0 to 255 for images of torch.uint8, got {self.value}")
        return erase(images, place, torch.tensor(values, dtype=torch.float32).to(images))

    def places(self, height: int, width: int, draws: Draws) -> Tensor:
        """Draw a rectangle for each image.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            draws: Random numbers of the images.

        Returns:
            (B, 4), int64 on the CPU: top, left, height, width. Height and width are 0 where the image stays.
        """
        rows, unit = np.arange(len(draws)), draws.on_cpu().uniform(shape=(2 * _TRIES + 3,)).numpy()
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * unit[:, :_TRIES])
        low, high = map(math.log, self.ratio)
        ratio = np.exp(low + (high - low) * unit[:, _TRIES : 2 * _TRIES])
        tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (tall < height) & (wide < width)
        first = fits.argmax(axis=1)
        there = fits[rows, first] & (unit[:, -3] < self.p)
        tall, wide = tall[rows, first] * there, wide[rows, first] * there
        top, left = unit[:, -2] * (height - tall + 1), unit[:, -1] * (width - wide + 1)
        return torch.from_numpy(np.stack([top, left, tall, wide], axis=1).astype(np.int64))


def erase(images: Tensor, places: Tensor, value: Tensor) -> Tensor:
    """Set the pixels of a rectangle of each image to a value.

    Args:
        images: (B, C, H, W).
        places: (B, 4) whole numbers: top, left, height, width.
        value: New pixels of the type of the images: (1,), (C,) or (B, C, H, W).

    Returns:
        New images of the same shape and type.
    """
    top, left, tall, wide = places.to(images.device).unsqueeze(2).unbind(dim=1)
    down, right = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((down >= top) & (down < top + tall)).unsqueeze(2) & ((right >= left) & (right < left + wide)).unsqueeze(1)
    value = value if value.ndim == 4 else value.view(-1, 1, 1)
    return torch.where(inside.unsqueeze(1), value, images, out=empty_like(images))
