"""A source that shows some of another's classes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Subset

from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.errors import InputError


class ClassSubset(Source):
    """Some classes of a source, counted from 0 in the order given: what a network is moved to, or comes from.

    An unlabeled part stays whole, since nobody knows its classes.

    Args:
        source: The source of all classes, one for each image.
        classes: Which of them, by index; none twice.

    Raises:
        InputError: For no classes, one that comes twice, or that the source does not have.
    """

    def __init__(self, source: Source, classes: list[int]) -> None:
        if not classes or len(set(classes)) < len(classes):
            raise InputError(f"classes must name at least one class, and none twice, got {classes}")
        self.source = source
        self.classes = classes
        self.train_transform = source.train_transform
        self.eval_transform = source.eval_transform

    def prepare(self) -> None:
        """Download what is missing."""
        self.source.prepare()

    def load(self) -> Parts:
        """Open the source, and choose."""
        parts = self.source.load()
        if parts.train.targets.ndim > 1 or parts.train.targets.is_floating_point():
            raise InputError(f"classes: the images of {type(self.source).__name__} have many labels each")
        if not len(parts.train.targets):
            raise InputError(f"classes: the training part of {type(self.source).__name__} is empty")
        names, count = parts.class_names, int(parts.train.targets.max()) + 1
        count = max(count, len(names or ()))
        if unknown := [number for number in self.classes if not 0 <= number < count]:
            raise InputError(f"classes: there is no class {unknown[0]}, only 0 ... {count - 1}")
        return Parts(
            self._choose(parts.train),
            None if parts.test is None else self._choose(parts.test),
            parts.unlabeled,
            None if names is None else [names[number] for number in self.classes],
        )

    def _choose(self, part: Part) -> Part:
        chosen = torch.isin(part.targets, torch.tensor(self.classes)).nonzero().flatten()
        place = torch.full((max(self.classes) + 1,), -1)
        place[self.classes] = torch.arange(len(self.classes))
        images: Any = Subset(part.images, chosen.tolist())  # type: ignore[arg-type]
        return Part(images, place[part.targets[chosen]])
