"""The base of all sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from kd_lightning.data.sources.images import Images


class Part(NamedTuple):
    """Images and their true labels: (N,) class indices, or (N, L) zeros and ones."""

    images: Images
    targets: Tensor


class Parts(NamedTuple):
    """What a source holds."""

    train: Part
    test: Part | None = None
    unlabeled: Images | None = None
    class_names: list[str] | None = None


class Source(ABC):
    """Images, labels, and the transforms that suit them.

    Attributes:
        train_transform: Default augmentation, from an item's image to a tensor; None: as it is.
        eval_transform: The same without randomness.
    """

    train_transform: nn.Module | None = None
    eval_transform: nn.Module | None = None

    def prepare(self) -> None:  # noqa: B027  (most sources have nothing to download)
        """Download what is not there; called once, on one process."""

    @abstractmethod
    def load(self) -> Parts:
        """Open the images and read the labels; called on every process."""
