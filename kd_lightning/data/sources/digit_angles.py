"""scikit-learn's handwritten digits, turned by an angle that is the label."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import InterpolationMode

from kd_lightning.data.sources.digits import Digits
from kd_lightning.data.sources.source import Part, Parts
from kd_lightning.data.transforms.geometry import RandomAffine


class DigitAngles(Digits):
    """The :class:`Digits` for the regression task: each is turned by a random angle, which is its label, in radians.

    Angles are uniform in ±pi/4, counterclockwise, and the same in each run. The training transform shifts and scales
    alone: it must not turn a digit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.train_transform = RandomAffine(
            degrees=0, translate=(0.125, 0.125), scale=(0.8, 1.2), interpolation=InterpolationMode.BILINEAR
        )

    def load(self) -> Parts:
        """Load 1197 training and 600 test images."""
        parts = super().load()
        assert parts.test is not None
        return Parts(_turned(parts.train, seed=0), _turned(parts.test, seed=1))


def _turned(part: Part, seed: int) -> Part:
    """Return the images of a part, each turned by its own angle, and the angles (N,)."""
    digits: Any = part.images
    images: Tensor = digits.tensors[0]
    draws = torch.rand(len(images), generator=torch.Generator().manual_seed(seed))
    angle = (draws - 0.5) * (math.pi / 2)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # from places in the new image to places in the old one; y points down
    turn = torch.stack([torch.stack([cos, -sin, zero], dim=1), torch.stack([sin, cos, zero], dim=1)], dim=1)
    grid = F.affine_grid(turn, [*images.shape], align_corners=False)
    return Part(TensorDataset(F.grid_sample(images, grid, align_corners=False)), angle)
