"""Samplers: the order of views follows from seed and epoch; and the batches of an epoch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from kd_lightning.errors import InputError


class EvenClasses:
    """Draw labeled samples such that each class comes equally often.

    Each draw of a class takes the next sample of a shuffled pass over its samples, so that within a class all samples
    come equally often, too. The draws of an epoch follow from (seed, epoch) and are the same on every rank.

    Args:
        labels: Class of each labeled sample, (N,). Labeled samples have the first positions.
        seed: Seed of the draws.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        classes = torch.unique(labels).tolist()
        self.members = [(labels == number).nonzero().flatten() for number in classes]
        self.size = len(labels)
        self.seed = seed

    def keys(self, count: int, epoch: int, most: int) -> Tensor:
        """Draw (position, view), (count, 2). The view counts on where a sample comes again, in this epoch or later.

        Args:
            count: Number of draws.
            epoch: The epoch.
            most: Largest number of draws of any epoch.
        """
        generator = _generator(self.seed, -(2**40) - epoch)  # no number of another order
        shares = torch.full((len(self.members),), count // len(self.members))
        shares[torch.randperm(len(shares), generator=generator)[: count % len(shares)]] += 1
        of_class = -(-most // len(self.members))
        drawn = []
        for members, share in zip(self.members, shares.tolist(), strict=True):
            passes = -(-of_class // len(members))  # those of an epoch, whatever this epoch's share is
            orders = torch.stack([torch.randperm(len(members), generator=generator) for _ in range(passes)])
            views = epoch * passes + torch.arange(passes).repeat_interleave(len(members))
            drawn.append(torch.stack([members[orders.flatten()], views], dim=1)[:share])
        keys = torch.cat(drawn)
        return keys[torch.randperm(len(keys), generator=generator)]


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
        even: What draws the labeled samples. Default: None, which means that each comes equally often.
    """

    def __init__(
        self,
        size: int,
        *,
        views_per_epoch: int,
        num_views: int | None,
        seed: int,
        num_replicas: int,
        rank: int,
        even: EvenClasses | None = None,
    ) -> None:
        super().__init__(range(size * views_per_epoch), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.views_per_epoch = views_per_epoch
        self.num_views = num_views
        self.even = even
        # with those that pad the shares of the ranks
        self._most_labeled = 0 if even is None else even.size * views_per_epoch + num_replicas

    def keys(self) -> Tensor:
        """Keys of this epoch on all ranks, (K, 2), padded to equal shares; key n belongs to rank n % num_replicas."""
        return self._draw_evenly(self._keys())

    def _draw_evenly(self, keys: Tensor) -> Tensor:
        """Replace the keys of labeled samples by those of ``even``, if it is set."""
        if self.even is None:
            return keys
        labeled = keys[:, 0] < self.even.size
        drawn = self.even.keys(int(labeled.sum()), self.epoch, self._most_labeled)
        keys[labeled] = self._stack_keys(*drawn.unbind(dim=1))
        return keys

    def _keys(self) -> Tensor:
        order = torch.randperm(self.size * self.views_per_epoch, generator=_generator(self.seed, self.epoch))
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        return self._stack_keys(order % self.size, self.epoch * self.views_per_epoch + order // self.size)

    def _stack_keys(self, positions: Tensor, views: Tensor) -> Tensor:
        return torch.stack([positions, views if self.num_views is None else views % self.num_views], dim=1)

    def share(self) -> Tensor:
        """Keys of this epoch on this rank, (K, 2)."""
        return self.keys()[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(tuple, self.share().tolist())

    def describe(self, steps: int, batch_size: int) -> str:
        """Return in one line how many rows the steps of an epoch have.

        Args:
            steps: Number of each rank's batches in an epoch.
            batch_size: Rows of a batch; the last one has what is left.

        >>> ViewSampler(37, views_per_epoch=1, num_views=None, seed=0, num_replicas=1, rank=0).describe(4, 9)
        'an epoch has 4 steps of 9 rows (10 in the last)'
        """
        last = len(self) - (steps - 1) * batch_size
        rows = last if steps == 1 else batch_size
        text = f"{rows} row{'s' if rows > 1 else ''}"
        return self._describe(steps, text, "" if last == rows else f" ({last} in the last)")

    def _describe(self, steps: int, rows: str, last: str) -> str:
        processes = f" on each of {self.num_replicas} processes" if self.num_replicas > 1 else ""
        views = f", with {self.views_per_epoch} views of each sample" if self.views_per_epoch > 1 else ""
        views += "; labeled samples are drawn evenly by class" if self.even is not None else ""
        return f"an epoch has {steps} step{'s' if steps > 1 else ''} of {rows}{processes}{last}{views}"


class TwoStreamSampler(ViewSampler):
    """Sample keys such that every batch begins with labeled samples and ends with unlabeled ones.

    The longer stream decides: an epoch is one pass over ``views_per_epoch`` views of its samples. It is the stream that
    needs more batches, and the unlabeled one if both need equally many. The samples of the other stream repeat as often
    as needed; each pass over them has a new order and view. Both orders follow from (seed, pass) and are the same on
    every rank.

    Args:
        labeled: Number of labeled samples. They have the first positions.
        unlabeled: Number of unlabeled samples.
        labeled_batch: Labeled samples in each rank's batch.
        unlabeled_batch: Unlabeled samples in each rank's batch. The last batch of an epoch may have fewer samples of
            the longer stream.
        kwargs: Other arguments of :class:`ViewSampler`.

    Attributes:
        longer: ``"unlabeled"`` or ``"labeled"``, the stream that decides the length of an epoch.
        steps: Number of each rank's batches in an epoch.
        passes: Passes over the samples of the other stream in an epoch.
    """

    def __init__(
        self, labeled: int, unlabeled: int, *, labeled_batch: int, unlabeled_batch: int, **kwargs: Any
    ) -> None:
        views, world = int(kwargs["views_per_epoch"]), int(kwargs["num_replicas"])

        def steps(size: int, batch: int) -> int:
            return -(-size * views // (batch * world))

        streams = {"unlabeled": (unlabeled, unlabeled_batch), "labeled": (labeled, labeled_batch)}
        self.longer = max(streams, key=lambda name: steps(*streams[name]))
        self.steps = steps(*streams[self.longer])
        super().__init__(streams.pop(self.longer)[0], **kwargs)
        ((self._repeated, self._repeated_batch),) = streams.values()
        self.labeled = labeled
        self.labeled_batch = labeled_batch
        self.unlabeled_batch = unlabeled_batch
        rows = self.steps * self._repeated_batch
        self.passes = rows * self.num_replicas / self._repeated
        self.num_samples += rows  # the length; total_size stays that of the longer stream
        self._most_labeled = self.total_size if self.longer == "labeled" else rows * self.num_replicas

    def _keys(self) -> Tensor:
        once, repeated = super()._keys(), self._repeated_keys()
        labeled, unlabeled = (once, repeated) if self.longer == "labeled" else (repeated, once)
        unlabeled[:, 0] += self.labeled
        sizes = self.labeled_batch * self.num_replicas, self.unlabeled_batch * self.num_replicas
        parts = zip(torch.split(labeled, sizes[0]), torch.split(unlabeled, sizes[1]), strict=True)
        return torch.cat([part for step in parts for part in step])

    def describe(self, steps: int, batch_size: int) -> str:
        """Return in one line the rows of both streams, which one decides, and how often the other's samples come."""
        rows = {"labeled": self.labeled_batch, "unlabeled": self.unlabeled_batch}
        left = self.total_size // self.num_replicas - (steps - 1) * rows[self.longer]
        last = "" if steps == 1 or left == rows[self.longer] else f" ({left} {self.longer} in the last)"
        if steps == 1:
            rows[self.longer] = left
        other = "labeled" if self.longer == "unlabeled" else "unlabeled"
        text = self._describe(steps, f"{rows['labeled']} labeled and {rows['unlabeled']} unlabeled rows", last)
        return f"{text}; the {self.longer} samples decide its length, the {other} ones come {self.passes:.3g} times"

    def _repeated_keys(self) -> Tensor:
        """Keys of the stream that repeats, of this epoch on all ranks, (K, 2)."""
        rows = self.steps * self._repeated_batch * self.num_replicas
        place = torch.arange(rows) + self.epoch * rows
        passes = place // self._repeated
        # seeded by -1 - pass, which is no epoch of the longer stream
        numbers = range(int(passes[0]), int(passes[-1]) + 1)
        orders = [torch.randperm(self._repeated, generator=_generator(self.seed, -1 - number)) for number in numbers]
        return self._stack_keys(torch.stack(orders)[passes - passes[0], place % self._repeated], passes)


class TrainingBatches(BatchSampler):
    """Batches of a sampler's keys. Where one key is left for the last batch, it joins the batch before.

    A network with BatchNorm cannot train on one row. Batches of one row exist only if ``batch_size`` is 1, or if an
    epoch has one row in all.

    Args:
        sampler: The keys of this rank. All ranks must have equally many, so that their batches have the same sizes.
        batch_size: Rows of a batch, at least 1.
        together: Number of batches that are read at once: an item has the keys of so many.

    Attributes:
        skip: Number of batches to leave out at the start, to resume in mid-epoch.
    """

    def __init__(self, sampler: Sampler[Any] | Iterable[Any], batch_size: int, together: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.together = together
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        # an array, which a worker process gets sooner than a list
        keys: Any = self.sampler.share().numpy() if isinstance(self.sampler, ViewSampler) else [*self.sampler]
        for number in range(self.skip, len(self), self.together):
            start = number * self.batch_size
            yield keys[start : start + sum(self.sizes(number))]

    def sizes(self, number: int) -> list[int]:
        """Return the rows of each batch that is read together with this one. An epoch's last has all that are left."""
        count = len(self)
        sizes = [self.batch_size] * min(self.together, count - number)
        if number + len(sizes) == count:
            sizes[-1] = len(self.sampler) - (count - 1) * self.batch_size  # type: ignore[arg-type]
        return sizes

    def __len__(self) -> int:
        rows, size = len(self.sampler), self.batch_size  # type: ignore[arg-type]
        return -(-rows // size) - int(rows > size > 1 and rows % size == 1)


def check_sizes(
    batch_size: int, labeled_batch_size: int | None, num_views: int | None, views_per_epoch: int, num_workers: int
) -> None:
    """Check the sizes of batches and the numbers of views and workers.

    Raises:
        InputError: If one is out of range, or no whole number.
    """
    numbers = {
        "batch_size": (batch_size, 1),
        "labeled_batch_size": (labeled_batch_size, None),
        "num_views": (num_views, 1),
        "views_per_epoch": (views_per_epoch, 1),
        "num_workers": (num_workers, 0),
    }
    for name, (number, least) in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise InputError(f"{name} must be a whole number, got {number!r}")
        if number is not None and least is not None and number < least:
            raise InputError(f"{name} must be at least {least}, got {number}")
    if labeled_batch_size is not None and not 1 <= labeled_batch_size < batch_size:
        raise InputError(
            f"labeled_batch_size must be at least 1 and below batch_size, {batch_size}, got {labeled_batch_size}"
        )


def training_sampler(
    labeled: int, unlabeled: int, *, batch_size: int, labeled_batch_size: int | None, **kwargs: Any
) -> ViewSampler:
    """Return the sampler of a training: of all samples together, or of two streams.

    Args:
        labeled: Number of labeled samples. They have the first positions.
        unlabeled: Number of unlabeled samples.
        batch_size: Rows of a batch on each rank.
        labeled_batch_size: Labeled ones among them. None means that all samples are shuffled together.
        kwargs: Other arguments of :class:`ViewSampler`.

    Raises:
        InputError: If one of two streams has no samples.
    """
    if labeled_batch_size is None:
        return ViewSampler(labeled + unlabeled, **kwargs)
    if not labeled or not unlabeled:
        missing = "unlabeled" if labeled else "labeled"
        raise InputError(f"labeled_batch_size needs labeled and unlabeled images, got no {missing} ones")
    sizes = {"labeled_batch": labeled_batch_size, "unlabeled_batch": batch_size - labeled_batch_size}
    return TwoStreamSampler(labeled, unlabeled, **sizes, **kwargs)


class ShareSampler(DistributedSampler[Any]):
    """Each rank's share of an evaluation set, in order and without repeats.

    If there are more ranks than samples, the ranks without a share get sample 0, which the loader marks as padding.

    Args:
        size: Number of samples.
        num_replicas: Number of processes.
        rank: Rank of this process.
        num_views: Number of views of each sample, one behind another. Default: None, which means positions without a
            view.

    Attributes:
        is_padded: Whether this rank has no share.
        positions: The share: positions, or pairs of a position and a view.
    """

    def __init__(self, size: int, *, num_replicas: int, rank: int, num_views: int | None = None) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        share = list(range(size))[rank::num_replicas]
        self.is_padded = not share
        # every rank needs a batch: metrics are gathered from all
        self.positions: list[int] | list[tuple[int, int]] = share or [0]
        if num_views is not None:
            self.positions = [(n, view) for n in share for view in range(num_views)] or [(0, 0)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(struct.pack("<2q", seed, number)))
