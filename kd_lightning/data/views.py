"""Replayable augmentation: what a view looks like, and in which order views come, follow from seeds alone."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.data.sources import Images, read_item
from kd_lightning.errors import InputError

Key = int | tuple[int, int]
_NAME = f"{InputError.__module__}.{InputError.__qualname__}"


class ViewDataset(Dataset[Batch]):
    """Samples by (position, view): the same pixels for the same (seed, index, view), whoever asks and when.

    Holds no labels, so none can leak. A key without a view is view 0.

    Args:
        images: The source's parts, one behind the other; indices run through all of them.
        indices: Which samples, (N,).
        transform: From an image to a tensor; None where it is one.
        seed: Of the augmentation.
    """

    def __init__(self, images: Sequence[Images], indices: Tensor, transform: Any, seed: int) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Batch]:
        """The samples of a batch; the generators are put back as they were, where anybody else uses them."""
        alone = get_worker_info() is not None  # a worker's generators serve nothing but this
        before = None if alone else (torch.get_rng_state(), random.getstate(), np.random.get_state())
        samples = [self._sample(*((key, 0) if isinstance(key, int) else key)) for key in keys]
        if before is not None:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])
        return samples

    def _sample(self, position: int, view: int) -> Batch:
        index = int(self.indices[position])
        image = self._image(index)
        if self.transform is not None:
            seed = zlib.crc32(struct.pack("<3q", self.seed, index, view))
            # not torch.manual_seed, which also queues a call for every accelerator
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            image = self.transform(image)
        if not isinstance(image, Tensor):
            raise InputError(f"a transform must give a tensor, got {type(image).__name__} for sample {index}")
        return Batch(image.as_subclass(Tensor), index=torch.tensor(index), view=torch.tensor(view))

    def _image(self, index: int) -> Any:
        for part in self.images:
            if index < len(part):
                item = read_item(part, index)
                return item[0] if isinstance(item, tuple | list) else item
            index -= len(part)
        raise IndexError(index)


def collate(samples: list[Batch]) -> Batch:
    """Stack samples."""
    try:
        x = torch.stack([sample.x for sample in samples])
    except RuntimeError as error:
        shapes = sorted({tuple(sample.x.shape) for sample in samples})
        raise InputError(f"samples must have one shape after their transform, got {shapes[:3]}") from error
    return Batch(
        x,
        index=torch.stack([sample.index for sample in samples if sample.index is not None]),
        view=torch.stack([sample.view for sample in samples if sample.view is not None]),
    )


class ViewSampler(DistributedSampler[Any]):
    """Shuffled (position, view) keys in an order that follows from (seed, epoch); each rank takes its share.

    An epoch has ``copies`` views of every sample: view = epoch * copies + copy, modulo ``views`` where set.
    Lightning leaves a DistributedSampler alone, and tells it the epoch.

    Args:
        size: Number of samples.
        copies: Views of each sample in an epoch.
        views: Number of different views; None: endless.
        seed: Of the order.
        num_replicas: Number of processes.
        rank: Of this process.
    """

    def __init__(self, size: int, *, copies: int, views: int | None, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(range(size * copies), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.copies = copies
        self.views = views
        self.skip = 0

    def order(self) -> Tensor:
        """This epoch's order of all ranks, filled up to equal shares."""
        generator = torch.Generator().manual_seed(zlib.crc32(struct.pack("<2q", self.seed, self.epoch)))
        order = torch.randperm(self.size * self.copies, generator=generator)
        return order.repeat(-(-self.total_size // len(order)))[: self.total_size]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.order()[self.rank :: self.num_replicas][self.skip :]
        copies, positions = order // self.size, order % self.size
        views = self.epoch * self.copies + copies
        if self.views is not None:
            views = views % self.views
        return zip(positions.tolist(), views.tolist(), strict=True)


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


class ViewLoader(DataLoader[Batch]):
    """DataLoader of Batches that a run can resume in mid-epoch, and that fills labels in by index.

    Labels are looked up here, in the main process, since workers hold old copies of a dataset.

    Args:
        dataset: A :class:`ViewDataset`.
        labels: The visible label of each index; missing ones are -100 or NaN.
        trainer: Tells how batches make up optimiser steps; None: each is one.
        kwargs: As of DataLoader.
    """

    def __init__(self, dataset: ViewDataset, labels: Tensor, trainer: Trainer | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("collate_fn", collate)
        super().__init__(dataset, **kwargs)
        self.labels = labels
        self.trainer = trainer
        self._done = (0, 0)
        self._resume = (-1, 0)

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch the loader is."""
        return {"epoch": self._done[0], "batches": self._done[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there; a later epoch starts at its beginning."""
        self._resume = (state["epoch"], state["batches"])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: nothing starts before the first batch is asked for, when Lightning has set the epoch.
        sampler = self.sampler
        if not isinstance(sampler, ViewSampler):
            for batch in self._batches():
                batch.y = self.labels[batch.index]
                yield batch
            return
        epoch = sampler.epoch
        start = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (-1, 0)
        assert self.batch_size is not None
        sampler.skip = start * self.batch_size
        order = self.dataset.indices[sampler.order() % sampler.size]  # type: ignore[attr-defined]
        for number, batch in enumerate(self._batches(), start):
            batch.y = self.labels[batch.index]
            batch.mean_labels = self._mean_labels(order, number)
            self._done = (epoch, number + 1)
            yield batch

    def _batches(self) -> Iterator[Batch]:
        try:
            yield from super().__iter__()
        except InputError as error:  # torch hands on what a worker raised with all of its traceback as the message
            raise InputError(str(error).strip().rsplit("\n", 1)[-1].removeprefix(f"{_NAME}: ")) from error

    def _mean_labels(self, order: Tensor, number: int) -> float:
        """Known labels of the optimiser step that a batch belongs to, over its batches on all ranks."""
        assert isinstance(self.sampler, ViewSampler)
        window, last = 1, len(self)
        if self.trainer is not None:
            window = self.trainer.accumulate_grad_batches
            last = int(min(last, self.trainer.num_training_batches))
        ranks = self.sampler.num_replicas
        rows = (self.batch_size or 1) * ranks
        first = number // window * window
        end = max(min(first + window, last), number + 1)
        labels = int(is_labeled(self.labels[order[first * rows : end * rows]]).sum())
        return labels / (ranks * (end - first))
