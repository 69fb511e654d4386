"""Samplers: the order of views follows from seed and epoch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class ViewSampler(DistributedSampler[Any]):
    """Sample keys (position, view) in an order that follows from (seed, epoch); each rank gets an equal share.

    An epoch has ``views_per_epoch`` views of every sample. View k of epoch e, k = 0 ... ``views_per_epoch`` - 1, is
    number ``e * views_per_epoch + k``, modulo ``num_views`` if set. The class is a DistributedSampler: Lightning does
    not replace it, and sets its epoch.

    Args:
        size: Number of samples.
        views_per_epoch: Views of each sample in an epoch.
        num_views: Number of different views of a sample. If None, every epoch has new ones.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: Rank of this process.

    Attributes:
        skip: Number of this rank's keys to leave out at the start, to resume in mid-epoch.
    """

    def __init__(
        self, size: int, *, views_per_epoch: int, num_views: int | None, seed: int, num_replicas: int, rank: int
    ) -> None:
        super().__init__(range(size * views_per_epoch), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.views_per_epoch = views_per_epoch
        self.num_views = num_views
        self.skip = 0

    def keys(self) -> Tensor:
        """Keys of this epoch on all ranks, (K, 2), padded to equal shares; key n belongs to rank n % num_replicas."""
        order = torch.randperm(self.size * self.views_per_epoch, generator=_generator(self.seed, self.epoch))
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        return self._stack_keys(order % self.size, self.epoch * self.views_per_epoch + order // self.size)

    def _stack_keys(self, positions: Tensor, views: Tensor) -> Tensor:
        return torch.stack([positions, views if self.num_views is None else views % self.num_views], dim=1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(tuple, self.keys()[self.rank :: self.num_replicas][self.skip :].tolist())


class TwoStreamSampler(ViewSampler):
    """Sample keys such that every batch begins with labeled samples and ends with unlabeled ones.

    An epoch is one pass over ``views_per_epoch`` views of the unlabeled samples. The labeled samples repeat as often as
    needed; each pass over them has a new order and view. Both orders follow from (seed, pass) and are the same on every
    rank.

    Args:
        labeled: Number of labeled samples. They have the first positions.
        unlabeled: Number of unlabeled samples.
        labeled_batch: Labeled samples in each rank's batch.
        unlabeled_batch: Unlabeled samples in each rank's batch; the last batch of an epoch may have fewer.
        kwargs: Other arguments of :class:`ViewSampler`.
    """

    def __init__(
        self, labeled: int, unlabeled: int, *, labeled_batch: int, unlabeled_batch: int, **kwargs: Any
    ) -> None:
        super().__init__(unlabeled, **kwargs)
        self.labeled = labeled
        self.labeled_batch = labeled_batch
        self.unlabeled_batch = unlabeled_batch
        self.steps = -(-self.num_samples // unlabeled_batch)
        self.num_samples += self.steps * labeled_batch  # the length; total_size stays that of the unlabeled stream

    def keys(self) -> Tensor:
        """Keys of this epoch on all ranks, (K, 2); key n belongs to rank n % num_replicas."""
        unlabeled = super().keys()
        unlabeled[:, 0] += self.labeled
        rows = self.labeled_batch * self.num_replicas
        place = torch.arange(self.steps * rows) + self.epoch * self.steps * rows
        passes = place // self.labeled
        # seeded by -1 - pass, which is no epoch of the unlabeled stream
        numbers = range(int(passes[0]), int(passes[-1]) + 1)
        orders = [torch.randperm(self.labeled, generator=_generator(self.seed, -1 - number)) for number in numbers]
        positions = torch.stack(orders)[passes - passes[0], place % self.labeled]
        labeled = self._stack_keys(positions, passes)
        rest = self.unlabeled_batch * self.num_replicas
        steps = range(self.steps)
        return torch.cat(
            [part[n * size : (n + 1) * size] for n in steps for part, size in ((labeled, rows), (unlabeled, rest))]
        )


class ShareSampler(DistributedSampler[int]):
    """Each rank's share of an evaluation set, in order and without repeats.

    If there are more ranks than samples, the ranks without a share get sample 0.

    Args:
        size: Number of samples.
        num_replicas: Number of processes.
        rank: Rank of this process.
    """

    def __init__(self, size: int, *, num_replicas: int, rank: int) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        # every rank needs a sample: metrics are gathered from all
        self.positions = list(range(size))[rank::num_replicas] or [0]

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(struct.pack("<2q", seed, number)))
