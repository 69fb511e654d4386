"""Coarse labels: which group of classes a sample is of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.errors import InputError


class CoarseLabels:
    """Superclasses, and how many of the samples without a label get theirs for one.

    Args:
        groups: The classes of each superclass, by name or, as plain numbers, by index; each class is in one.
        fraction: Share of the training images outside ``labeled`` whose superclass is known, in [0, 1]; each is drawn
            with this probability by the datamodule's seed. 0 where only a label file has coarse labels.

    Raises:
        InputError: For a fraction out of range; and when the classes are known, if one is in no superclass or in two,
            or a superclass names none.
    """

    def __init__(self, groups: dict[str, list[str | int]], fraction: float = 1.0) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise InputError(f"coarse: fraction must lie in [0, 1], got {fraction}")
        self.groups = groups
        self.fraction = float(fraction)
        self.names = [*groups]

    def members(self, classes: int, class_names: Sequence[str] | None) -> Tensor:
        """Which classes each superclass holds, (G, C) booleans."""
        names = list(class_names or map(str, range(classes)))
        members = torch.zeros(len(self.groups), classes, dtype=torch.bool)
        for row, (group, entries) in zip(members, self.groups.items(), strict=True):
            if not entries:
                raise InputError(f"coarse: {group!r} holds no class")
            for entry in entries:
                number = names.index(entry) if entry in names else entry
                if not isinstance(number, int) or not 0 <= number < classes:
                    raise InputError(f"coarse: {group!r} holds {entry!r}, which is no class; there are {names[:20]}")
                if members[:, number].any():
                    raise InputError(f"coarse: class {names[number]!r} is in two superclasses, or twice in {group!r}")
                row[number] = True
        if left_out := (~members.any(dim=0)).nonzero().flatten().tolist():
            raise InputError(f"coarse: class {names[left_out[0]]!r} is in no superclass")
        return members

    def choose(self, candidates: Sequence[int], size: int, seed: int) -> Tensor:
        """Which of some indices below ``size`` get a coarse label, in ascending order.

        The draw of an index is its own, so that it keeps its label when others get better ones.
        """
        index = torch.tensor(sorted(candidates), dtype=torch.long)
        # the second row, since label noise is drawn from the first
        draws = torch.rand(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[1]
        return index[draws[index] < self.fraction]
