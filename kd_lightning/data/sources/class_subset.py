"""A subset of the classes of a source."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Subset

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.source import Part, Parts, Source, check_parts
from kd_lightning.data.sources.targets import count_classes, has_one_class
from kd_lightning.errors import InputError


class ClassSubset(Source):
    """Some classes of a source, for transfer from or to these. They are numbered from 0 in the order given.

    An unlabeled part stays whole, as do images without a label: their classes are unknown. If no test image has one of
    the classes, there is no test part.

    Args:
        source: A source with one class per image.
        classes: Indices of the classes to select, each once.

    Raises:
        InputError: If ``classes`` is empty, has a class twice, or has one that the source lacks.
    """

    def __init__(self, source: Source, classes: list[int]) -> None:
        if not classes or len(set(classes)) < len(classes):
            raise InputError(f"classes must name at least one class, and none twice, got {classes}")
        self.source = source
        self.classes = classes
        self.train_transform = source.train_transform
        self.eval_transform = source.eval_transform

    def prepare(self) -> None:
        """Download the missing files of the source."""
        self.source.prepare()

    def load(self) -> Parts:
        """Load the source, and select the classes."""
        parts = check_parts(self.source.load(), type(self.source).__name__)
        if parts.train.dense or not has_one_class(parts.train.targets):
            raise InputError(
                f"classes: images must have one class each; those of {type(self.source).__name__} have many labels"
            )
        if not len(parts.train.targets):
            raise InputError(f"classes: the training part of {type(self.source).__name__} is empty")
        names = parts.class_names
        count = count_classes(parts.train.targets, names)
        if unknown := [number for number in self.classes if not 0 <= number < count]:
            raise InputError(f"classes must be 0 ... {count - 1}, got {unknown[0]}")
        test, val = (None if part is None else self._select(part) for part in (parts.test, parts.val))
        return Parts(
            self._select(parts.train),
            test if test is not None and len(test.targets) else None,
            parts.unlabeled,
            None if names is None else [names[number] for number in self.classes],
            val=val,
            pool_groups=parts.pool_groups,
        )

    def _select(self, part: Part) -> Part:
        missing = part.targets == IGNORE_INDEX
        selected = (torch.isin(part.targets, torch.tensor(self.classes)) | missing).nonzero().flatten()
        new_class = torch.full((max(self.classes) + 1,), IGNORE_INDEX)
        new_class[self.classes] = torch.arange(len(self.classes))
        images: Any = Subset(part.images, selected.tolist())  # type: ignore[arg-type]
        targets = part.targets[selected]
        return part._replace(
            images=images,
            targets=torch.where(targets == IGNORE_INDEX, targets, new_class[targets.clamp_min(0)]),
            weights=None if part.weights is None else part.weights[selected],
            groups=None if part.groups is None else [part.groups[number] for number in selected.tolist()],
        )
