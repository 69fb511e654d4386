"""Random images, for trying things out."""

from __future__ import annotations

import torchvision

from kd_lightning.data.sources._parts import dataset_part
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms.base import Compose
from kd_lightning.data.transforms.geometry import RandomHorizontalFlip
from kd_lightning.data.transforms.recipes import to_float


class FakeData(Source):
    """torchvision's FakeData: random images with random labels.

    Args:
        size: Number of training images, and of test images.
        image_size: Channels, height and width.
        num_classes: Number of classes.
    """

    def __init__(self, size: int = 256, image_size: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10) -> None:
        self.size = size
        self.image_size = tuple(image_size)
        self.num_classes = num_classes
        self.train_transform = Compose([RandomHorizontalFlip(), to_float()])
        self.eval_transform = to_float()

    def load(self) -> Parts:
        """Create the images."""
        train, test = (
            torchvision.datasets.FakeData(self.size, self.image_size, self.num_classes, random_offset=offset)
            for offset in (0, self.size)
        )
        return Parts(
            dataset_part(train), dataset_part(test), class_names=[str(number) for number in range(self.num_classes)]
        )
