"""The images of a source in four rotations, each of which is a class of its own."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kd_lightning.data.sources.images import Images, path_of, read_image
from kd_lightning.data.sources.source import Part, Parts, Source, check_parts, passed_over
from kd_lightning.data.sources.targets import count_classes, has_label, has_one_class
from kd_lightning.errors import InputError


class RotatedClasses(Source):
    """Turn C classes into 4 C: each image upright, and rotated counterclockwise by 90, 180 and 270 degrees.

    For pretraining of a network that later learns other classes. To recognise rotations, its features must describe
    more of the images than C classes need (Lee, Hwang, Shin, "Self-supervised Label Augmentation via Input
    Transformations", 2020). Class c, rotated k times, is class k C + c.

    Args:
        source: A source with one class per image. Its unlabeled part is left out. An image without a label has none
            in any rotation.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.train_transform = source.train_transform
        self.eval_transform = source.eval_transform

    def prepare(self) -> None:
        """Download the missing files of the source."""
        self.source.prepare()

    def load(self) -> Parts:
        """Load the source.

        Raises:
            InputError: If its images have many labels each.
        """
        parts = check_parts(self.source.load(), type(self.source).__name__)
        targets = parts.train.targets
        if parts.train.dense or not has_one_class(targets):
            name = type(self.source).__name__
            raise InputError(f"RotatedClasses: images must have one class each; those of {name} have many labels")
        names = parts.class_names or [str(number) for number in range(count_classes(targets, None))]
        train, test, val = (
            None if part is None else _rotated(part, len(names)) for part in (parts.train, parts.test, parts.val)
        )
        assert train is not None
        return Parts(
            train,
            test,
            val=val,
            class_names=[f"{name} at {90 * turns}" for turns in range(4) for name in names],
        )


class RotatedImages:
    """All images, then all of them rotated once, twice and three times."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.passed_over = passed_over(images)
        paths = [path_of([images], number) for number in range(len(images))] if len(images) else []
        self.paths = paths * 4 if all(paths) else None  # read by path_of
        own = len({*paths}) == len(paths)  # whether no two images have one file
        self.variants = [turns for turns in range(4) for _ in paths] if own else None  # read by identify

    def __getitem__(self, index: int, /) -> Any:
        turns, index = divmod(index, len(self.images))
        image = read_image([self.images], index)
        if isinstance(image, Image.Image):
            return image.rotate(90 * turns, expand=True)
        if not isinstance(image, Tensor) or image.ndim < 2:
            raise InputError(
                f"RotatedClasses: images must be PIL images or tensors (C, H, W), got {type(image).__name__}"
            )
        return torch.rot90(image, turns, (-2, -1))

    def __len__(self) -> int:
        return 4 * len(self.images)


def _rotated(part: Part, classes: int) -> Part:
    known = has_label(part.targets)
    targets = [torch.where(known, part.targets + turns * classes, part.targets) for turns in range(4)]
    return part._replace(
        images=RotatedImages(part.images),
        targets=torch.cat(targets),
        weights=None if part.weights is None else part.weights.repeat(4),
        groups=None if part.groups is None else part.groups * 4,
    )
