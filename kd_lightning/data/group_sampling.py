"""Choose whole groups of samples for a part of the data."""

from __future__ import annotations

from collections import Counter, defaultdict
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
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for name, number in zip(groups, classes.tolist(), strict=True):
        counts[name][number] += 1
    left, missing = Counter(classes.tolist()), wanted.tolist()
    names = sorted(counts)
    chosen: set[str] = set()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    for name in [names[number] for number in order] * 2:
        more = counts[name]
        nearer = sum(abs(missing[c] - count) - abs(missing[c]) for c, count in more.items()) < 0
        if name not in chosen and nearer and all(left[c] > count for c, count in more.items()):
            chosen.add(name)
            for c, count in more.items():
                left[c] -= count
                missing[c] -= count
    return chosen
