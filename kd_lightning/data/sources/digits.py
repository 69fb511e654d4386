"""scikit-learn's handwritten digits."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import InterpolationMode

from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.data.transforms.geometry import RandomAffine
from kd_lightning.data.transforms.recipes import to_float


class Digits(Source):
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; a fixed random sample of 600 is the test part.

    Images are tensors (1, 8, 8) in [0, 1].
    """

    def __init__(self) -> None:
        self.eval_transform = to_float()
        # rotation and scale alone: shifts are below half a pixel, and rounded to whole pixels
        self.train_transform = RandomAffine(
            degrees=10, translate=(0.0625, 0.0625), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR
        )

    def load(self) -> Parts:
        """Load 1197 training and 600 test images."""
        table = _read_table()
        images = torch.from_numpy(table[:, :-1] / 16).float().view(-1, 1, 8, 8)
        targets = torch.from_numpy(table[:, -1]).long()
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(targets)))
        train, test = order[600:], order[:600]
        return Parts(
            Part(TensorDataset(images[train]), targets[train]),
            Part(TensorDataset(images[test]), targets[test]),
            class_names=[str(number) for number in range(10)],
        )


@cache
def _read_table() -> npt.NDArray[np.float64]:
    """Return a row for each image: 64 pixels from 0 to 16, and the class. A process reads the file once."""
    return np.loadtxt(_digits_file(), delimiter=",")


def _digits_file() -> Path:
    """Return scikit-learn's file of the digits, without importing scikit-learn: that takes half a second."""
    spec = find_spec("sklearn")
    assert spec is not None  # this package needs it
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
