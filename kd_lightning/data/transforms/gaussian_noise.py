"""Noise of a normal distribution, for rows of a table, embeddings and images."""

from __future__ import annotations

import math

from torch import Tensor

from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError


class GaussianNoise(BatchTransform):
    """Add noise of mean 0 to each value. Nothing is clipped, unlike with torchvision's transform of this name.

    One ``sigma`` fits features of one scale: standardize a table before.

    Args:
        sigma: Standard deviation of the noise, in the unit of the values; finite and at least 0.

    Raises:
        InputError: If ``sigma`` is out of range. In a call: if values are no floats.
    """

    moves_pixels = False

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        if not 0 <= sigma < math.inf:
            raise InputError(f"sigma must be finite and at least 0, got {sigma}")
        self.sigma = float(sigma)

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return new values (B, ...) of the same type."""
        if not images.is_floating_point():
            raise InputError(f"GaussianNoise needs floats, got {images.dtype}")
        return images + (self.sigma * draws.normal(images.shape[1:])).to(images)
