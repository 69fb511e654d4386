"""Coarse labels: which group of classes a sample is of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.losses.coarse import members_of


class CoarseLabels:
    """Superclasses, and how many of the samples without a label get theirs for one.

    Args:
        groups: The classes of each superclass, by index or name; each class is in one.
        fraction: Share of the training images outside ``labeled`` whose superclass is known, in [0, 1]; drawn by the
            datamodule's seed. 0 where only a label file has coarse labels.

    Raises:
        InputError: For a fraction out of range; and when the classes are known, if one is in no superclass or in two.
    """

    def __init__(self, groups: dict[str, list[int | str]], fraction: float = 1.0) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise InputError(f"coarse: fraction must lie in [0, 1], got {fraction}")
        self.groups = groups
        self.fraction = float(fraction)
        self.names = [*groups]

    def members(self, classes: int, class_names: Sequence[str] | None) -> Tensor:
        """Which classes each superclass holds, (G, C) booleans."""
        names = list(class_names or map(str, range(classes)))
        groups = []
        for group, entries in self.groups.items():
            if unknown := [e for e in entries if isinstance(e, str) and e not in names]:
                raise InputError(f"coarse: {group!r} holds {unknown[0]!r}, which is no class; there are {names[:20]}")
            groups.append([names.index(e) if isinstance(e, str) else e for e in entries])
        try:
            return members_of(groups, classes)
        except InputError as error:
            left_out = [name for number, name in enumerate(names) if not any(number in group for group in groups)]
            named = f" (class {left_out[0]!r})" if left_out else ""
            raise InputError(f"coarse: {error}{named}") from error

    def choose(self, candidates: Sequence[int], seed: int) -> Tensor:
        """Which of some indices get a coarse label, in ascending order."""
        index = torch.tensor([*candidates], dtype=torch.long)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(index), generator=generator)[: round(self.fraction * len(index))]
        return index[chosen].sort().values
