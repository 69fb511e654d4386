"""Which sample a view is mixed with, by mixup or CutMix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.data.transforms.draws import Draws

_STREAM = -2
"""Stream of a view's random numbers; others are those of a strong view, and of how a view is mixed."""


class Partners:
    """Draw the sample that each view is mixed with. It follows from (seed, index, view).

    Labeled samples are mixed with labeled ones, and the others with others. A partner is another sample, unless there
    is none: with ``classes``, if its class has no other.

    Args:
        seed: Seed of the augmentation.
        indices: Index of the sample at each position, (N,).
        labeled: Number of the first positions, which are labeled.
        classes: Labeled positions of each class. Partners of labeled samples then come from each class equally often,
            and within a class from each sample. Default: None, which means that each sample comes equally often.
    """

    def __init__(self, seed: int, indices: Tensor, labeled: int, classes: Sequence[Tensor] | None = None) -> None:
        self.seed = seed
        self.indices = indices
        self.labeled = labeled
        groups = [*(classes or [torch.arange(labeled)]), torch.arange(labeled, len(indices))]
        self._sizes = torch.tensor([len(group) for group in groups])
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._order = torch.cat(groups)
        self._places = torch.empty_like(self._order)
        self._places[self._order] = torch.arange(len(self._order))

    def __call__(self, keys: Tensor) -> Tensor:
        """Return the index of each view's partner, (B,).

        Args:
            keys: (position, view) of each view, (B, 2).
        """
        position, view = keys.unbind(dim=1)
        draws = Draws(self.seed, self.indices[position], view).stream(_STREAM)
        drawn, others = draws.uniform(), len(self._sizes) - 1
        group = torch.where(position < self.labeled, draws.integers(0, others - 1), others)
        start, size = self._starts[group], self._sizes[group]
        own = self._places[position] - start  # its own place in the group, if it is there
        next_ones = (own + 1 + (drawn * (size - 1)).long()) % size
        place = torch.where((own >= 0) & (own < size), next_ones, (drawn * size).long())
        return self.indices[self._order[start + place]]

    @property
    def hash(self) -> str:
        """SHA-256 of what decides a partner besides the seed."""
        digest = hashlib.sha256(str(self._sizes.tolist()).encode())
        for part in (self.indices, self._order):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()
