"""Choose whole groups of samples for a part of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose_groups(groups: Sequence[str], classes: Tensor, wanted: Tensor, seed: int) -> set[str]:
    """Choose whole groups such that they hold about the wanted number of samples of each class.

    Groups are visited in random order, and then once more. One is taken if it brings the counts nearer to the wanted
    ones, and leaves each class a sample.

    Args:
        groups: Group of each sample, N.
        classes: Class of each sample, (N,), 0 ... C - 1.
        wanted: Wanted number of samples of each class, (C,).
        seed: Seed of the order.
    """
    names = sorted({*groups})
    numbers = {name: number for number, name in enumerate(names)}
    counts = torch.zeros(len(names), len(wanted), dtype=torch.long)
    counts.index_put_((torch.tensor([numbers[name] for name in groups]), classes), torch.tensor(1), accumulate=True)
    left, have = counts.sum(dim=0), torch.zeros_like(wanted)
    chosen: set[str] = set()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    for number in order * 2:
        more = counts[number]
        nearer = (wanted - have - more).abs().sum() < (wanted - have).abs().sum()
        if names[number] not in chosen and nearer and ((left - more > 0) | (more == 0)).all():
            chosen.add(names[number])
            left, have = left - more, have + more
    return chosen
