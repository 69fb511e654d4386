"""Coarse labels: the superclass of a sample in place of its class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.errors import InputError


class CoarseLabels:
    """Superclasses, which are the labels of all or a fraction of the samples without a label.

    Args:
        groups: Classes of each superclass, by name, or by index from 0 if an entry is an int. Names that are numbers
            need quotes where the two differ. Each class is in one superclass.
        fraction: Probability, in [0, 1], that the superclass of a training image outside ``labeled`` is known. The
            images are sampled with the datamodule's seed. 0 if coarse labels come from a label file alone.

    Raises:
        InputError: For a fraction out of range. Once the classes are known: for a class in no superclass or in two,
            for a superclass without a class, and for an int that is also the name of another class.
    """

    def __init__(self, groups: dict[str, list[str | int]], fraction: float = 1.0) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise InputError(f"coarse: fraction must lie in [0, 1], got {fraction}")
        self.groups = {normal_name(name): entries for name, entries in groups.items()}
        self.fraction = float(fraction)
        self.names = [*self.groups]
        if len(self.names) < len(groups):
            raise InputError(f"coarse: two superclasses have the same name, got {[*groups]}")

    def members(self, classes: int, class_names: Sequence[str] | None) -> Tensor:
        """Which classes each superclass holds, (G, C) booleans, for ``classes`` = C."""
        names = [normal_name(name) for name in class_names or map(str, range(classes))]
        members = torch.zeros(len(self.groups), classes, dtype=torch.bool)
        for row, (group, entries) in zip(members, self.groups.items(), strict=True):
            if not entries:
                raise InputError(f"coarse: {group!r} holds no class")
            for entry in entries:
                text = normal_name(str(entry))
                number = names.index(text) if isinstance(entry, str) and text in names else entry
                if not isinstance(number, int) or not 0 <= number < classes:
                    first = f" (an int is an index, and 0 is {names[0]!r})" if isinstance(entry, int) else ""
                    raise InputError(
                        f"coarse: {group!r} holds {entry!r}, which is not a class; allowed: {names[:20]}{first}"
                    )
                if isinstance(entry, int) and text in names and names[entry] != text:
                    raise InputError(
                        f"coarse: {group!r} holds {entry}, the index of class {names[entry]!r} and the name of another "
                        f"class; write names in quotes"
                    )
                if members[:, number].any():
                    raise InputError(f"coarse: class {names[number]!r} is in two superclasses, or twice in {group!r}")
                row[number] = True
        if left_out := (~members.any(dim=0)).nonzero().flatten().tolist():
            raise InputError(f"coarse: class {names[left_out[0]]!r} is in no superclass")
        return members

    def select(self, candidates: Sequence[int], size: int, seed: int) -> Tensor:
        """Select the indices that get a coarse label, among candidates below ``size``; ascending.

        Whether an index is selected depends on ``seed``, ``size`` and the index alone, not on the other candidates.
        """
        index = torch.tensor(sorted(candidates), dtype=torch.long)
        # the second row: label noise uses the first
        chance = torch.rand(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[1]
        return index[chance[index] < self.fraction]
