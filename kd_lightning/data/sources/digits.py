"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from kd_lightning.data.sources.source import Part, Parts, Source


class Digits(Source):
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; a fixed random sample of 600 is the test part.

    Images are tensors (1, 8, 8) in [0, 1].
    """

    def __init__(self) -> None:
        # rotation and scale alone: shifts are below half a pixel, and rounded to whole pixels
        self.train_transform = v2.RandomAffine(
            degrees=10, translate=(0.0625, 0.0625), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        )

    def load(self) -> Parts:
        """Load 1197 training and 600 test images."""
        from sklearn.datasets import load_digits  # here: the import takes half a second

        digits = load_digits()
        images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
        targets = torch.from_numpy(digits.target).long()
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(targets)))
        train, test = order[600:], order[:600]
        return Parts(
            Part(TensorDataset(images[train]), targets[train]),
            Part(TensorDataset(images[test]), targets[test]),
            class_names=[str(name) for name in digits.target_names],
        )
