"""The base of all sources, and the parts that they load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from kd_lightning.data.sources.images import Images
from kd_lightning.errors import InputError


class Part(NamedTuple):
    """Images and their true labels: (N,) class indices, or (N, L) zeros and ones."""

    images: Images
    targets: Tensor


class Parts(NamedTuple):
    """The parts of a source; None for those that it lacks."""

    train: Part
    test: Part | None = None
    unlabeled: Images | None = None
    class_names: list[str] | None = None


class Source(ABC):
    """Images, labels, and default transforms for them.

    Attributes:
        train_transform: Default augmentation, from an image to a tensor. None if images are tensors and stay as they
            are.
        eval_transform: Default transform for evaluation, without randomness. None likewise.
    """

    train_transform: nn.Module | None = None
    eval_transform: nn.Module | None = None

    def prepare(self) -> None:  # noqa: B027  (most sources have nothing to download)
        """Download missing files. Called once, on one process."""

    @abstractmethod
    def load(self) -> Parts:
        """Open the images and read the labels. Called on every process."""


def check_not_empty(parts: Parts, source: str) -> None:
    """Raise InputError for a part without images; ``source`` is the name of the source for the message."""
    images = {"train": parts.train.images, "unlabeled": parts.unlabeled}
    images["test"] = None if parts.test is None else parts.test.images
    for name, part in images.items():
        if part is not None and len(part) == 0:
            raise InputError(f"{name}: the {name} part of {source} is empty; it must have at least one image")
