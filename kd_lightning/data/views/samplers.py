"""In which order views come: a function of seed and epoch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class ViewSampler(DistributedSampler[Any]):
    """Shuffled (position, view) keys in an order that follows from (seed, epoch); each rank takes its share.

    An epoch has ``views_per_epoch`` views of every sample: view = epoch * views_per_epoch + copy, modulo ``num_views`` where set.
    Lightning leaves a DistributedSampler alone, and tells it the epoch.

    Args:
        size: Number of samples.
        views_per_epoch: Views of each sample in an epoch.
        num_views: Number of different views; None: endless.
        seed: Of the order.
        num_replicas: Number of processes.
        rank: Of this process.
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
        """This epoch's positions and views of all ranks, (K, 2), filled up to equal shares; rank r has every r-th."""
        order = torch.randperm(self.size * self.views_per_epoch, generator=_generator(self.seed, self.epoch))
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        return self._keys(order % self.size, self.epoch * self.views_per_epoch + order // self.size)

    def _keys(self, positions: Tensor, views: Tensor) -> Tensor:
        return torch.stack([positions, views if self.num_views is None else views % self.num_views], dim=1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(tuple, self.keys()[self.rank :: self.num_replicas][self.skip :].tolist())


class TwoStreamSampler(ViewSampler):
    """Keys of which every batch begins with labeled samples, and goes on with unlabeled ones.

    An epoch is one pass over ``views_per_epoch`` views of the unlabeled samples. The labeled ones come round as often as it
    takes, in a new order and view each time; both orders follow from (seed, pass), on every rank.

    Args:
        labeled: Number of labeled samples; theirs are the first positions.
        unlabeled: Number of unlabeled samples.
        labeled_batch: Labeled samples in each rank's batch.
        unlabeled_batch: Unlabeled samples in each rank's batch; the last of an epoch may have fewer.
        kwargs: As of ViewSampler.
    """

    def __init__(
        self, labeled: int, unlabeled: int, *, labeled_batch: int, unlabeled_batch: int, **kwargs: Any
    ) -> None:
        super().__init__(unlabeled, **kwargs)
        self.labeled = labeled
        self.labeled_batch = labeled_batch
        self.unlabeled_batch = unlabeled_batch
        self.steps = -(-self.num_samples // unlabeled_batch)
        self.num_samples += self.steps * labeled_batch  # what __len__ gives
        # total_size stays that of the unlabeled stream

    def keys(self) -> Tensor:
        """This epoch's positions and views of all ranks, (K, 2); rank r has every r-th."""
        unlabeled = super().keys()
        unlabeled[:, 0] += self.labeled
        rows = self.labeled_batch * self.num_replicas
        place = torch.arange(self.steps * rows) + self.epoch * self.steps * rows
        passes = place // self.labeled
        # -1 - pass: no epoch of the other stream has that number
        numbers = range(int(passes[0]), int(passes[-1]) + 1)
        orders = [torch.randperm(self.labeled, generator=_generator(self.seed, -1 - number)) for number in numbers]
        positions = torch.stack(orders)[passes - passes[0], place % self.labeled]
        labeled = self._keys(positions, passes)
        rest = self.unlabeled_batch * self.num_replicas
        steps = range(self.steps)
        return torch.cat(
            [part[n * size : (n + 1) * size] for n in steps for part, size in ((labeled, rows), (unlabeled, rest))]
        )


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(struct.pack("<2q", seed, number)))


class ShareSampler(DistributedSampler[int]):
    """Each rank's share of an evaluation set, in order and without repeats, so that no sample counts twice."""

    def __init__(self, size: int, *, num_replicas: int, rank: int) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        # every rank needs a sample, or it would miss the gathering of the metrics
        self.share = list(range(size))[rank::num_replicas] or [0]

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)
