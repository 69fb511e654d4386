"""Replayable augmentation: what a view looks like, and in which order views come, follow from seeds alone."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from kd_lightning.batch import Batch, Rows
from kd_lightning.data.images import Images, contents, read_image
from kd_lightning.data.labels import Labels
from kd_lightning.errors import InputError
from kd_lightning.fingerprints import fingerprint

Key = int | tuple[int, int]
_BARE = vars(nn.Module())  # what every module holds
_NAME = f"{InputError.__module__}.{InputError.__qualname__}"


@dataclass(slots=True)
class Sample:
    """One view of one sample; plain numbers, since a tensor for each would take longer to make than to augment."""

    x: Tensor
    index: int
    view: int
    x_strong: Tensor | None = None


class ViewDataset(Dataset[Sample]):
    """Samples by (position, view): the same pixels for the same (seed, index, view), whoever asks and when.

    Holds no labels, so none can leak. A key without a view is view 0.

    Args:
        images: The source's parts, one behind the other; indices run through all of them.
        indices: Which samples, (N,).
        transform: From an image to a tensor; None where it is one.
        seed: Of the augmentation.
        strong_transform: Likewise, for the stronger view that a sample has beside its own.
    """

    def __init__(
        self, images: Sequence[Images], indices: Tensor, transform: Any, seed: int, strong_transform: Any = None
    ) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.strong_transform = strong_transform
        self._torch_alone = draws_from_torch_alone(transform) and draws_from_torch_alone(strong_transform)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """The samples of a batch; the generators are put back as they were, where anybody else uses them."""
        alone = get_worker_info() is not None  # a worker's generators serve nothing but this
        before = None if alone else torch.get_rng_state()
        others = None if alone or self._torch_alone else (random.getstate(), np.random.get_state())
        pairs = [(key, 0) if isinstance(key, int) else key for key in keys]
        indices = self.indices[[position for position, _ in pairs]].tolist()
        samples = [self._sample(index, view) for index, (_, view) in zip(indices, pairs, strict=True)]
        if before is not None:
            torch.set_rng_state(before)
        if others is not None:
            random.setstate(others[0])
            np.random.set_state(others[1])
        return samples

    def _sample(self, index: int, view: int) -> Sample:
        image = read_image(self.images, index)
        x = self._apply(self.transform, image, index, struct.pack("<3q", self.seed, index, view))
        if self.strong_transform is None:
            return Sample(x, index, view)
        strong = self._apply(self.strong_transform, image, index, struct.pack("<4q", self.seed, index, view, 1))
        if strong.shape != x.shape:
            shapes = f"{[*strong.shape]} and {[*x.shape]}"
            raise InputError(f"strong_transform must give the shape that train_transform gives, got {shapes}")
        return Sample(x, index, view, strong)

    def _apply(self, transform: Any, image: Any, index: int, key: bytes) -> Tensor:
        if transform is not None:
            seed = zlib.crc32(key)
            # not torch.manual_seed, which also queues a call for every accelerator
            torch.default_generator.manual_seed(seed)
            if not self._torch_alone:  # these two take longer than everything else that a replay costs
                random.seed(seed)
                np.random.seed(seed)
            image = transform(image)
        if not isinstance(image, Tensor):
            raise InputError(f"a transform must give a tensor, got {type(image).__name__} for sample {index}")
        return image if type(image) is Tensor else image.as_subclass(Tensor)


def draws_from_torch_alone(transform: Any) -> bool:
    """Whether a transform consists of torch's and torchvision's (v2) own alone, none of which draws from elsewhere.

    >>> from torchvision.transforms import v2
    >>> draws_from_torch_alone(v2.Compose([v2.RandomHorizontalFlip()])), draws_from_torch_alone(v2.Lambda(abs))
    (True, False)
    """
    if transform is None:
        return True
    origin = type(transform).__module__
    if not isinstance(transform, nn.Module) or not origin.startswith(("torchvision.transforms.v2.", "torch.nn.")):
        return False
    held = [value for value in vars(transform).values() if isinstance(value, list | tuple)]
    inner = [*transform.children(), *(one for values in held for one in values if callable(one))]
    functions = [one for name, one in vars(transform).items() if callable(one) and name not in _BARE]
    functions += [*transform._forward_pre_hooks.values(), *transform._forward_hooks.values()]
    return not functions and all(map(draws_from_torch_alone, inner))


def collate(samples: list[Sample]) -> Batch:
    """Stack samples."""
    try:
        x = torch.stack([sample.x for sample in samples])
    except RuntimeError as error:
        shapes = sorted({tuple(sample.x.shape) for sample in samples})
        raise InputError(f"samples must have one shape after their transform, got {shapes[:3]}") from error
    strong = [sample.x_strong for sample in samples if sample.x_strong is not None]
    return Batch(
        x,
        index=torch.tensor([sample.index for sample in samples]),
        view=torch.tensor([sample.view for sample in samples]),
        x_strong=torch.stack(strong) if strong else None,
    )


class Views:
    """Every view of some samples, by index, as the rows of a table: row = place of the sample * views + view.

    Args:
        dataset: The samples.
        views: How many of each; evaluation transforms have one.
        num_workers: Processes that :meth:`loader` reads with.
    """

    def __init__(self, dataset: ViewDataset, views: int, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.views = views
        self.num_workers = num_workers
        self._kept: str | None = None  # the transform's fingerprint when teachers kept their outputs
        self._indices, self._positions = (part.numpy() for part in dataset.indices.sort())

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def rows(self, batch: Batch) -> Rows:
        """Where a batch's rows stand."""
        assert batch.index is not None
        assert batch.view is not None
        index = batch.index.numpy()
        places = np.searchsorted(self._indices, index).clip(max=len(self._indices) - 1)
        if (self._indices[places] != index).any():
            raise InputError(
                "cache: a batch holds samples that the teachers' outputs were not kept of; start a new fit"
            )
        return Rows(self, places * self.views + batch.view.numpy())

    def read(self, batches: Iterable[Iterable[int]], seed: int = 0) -> Iterator[Batch]:
        """Batches of these rows; torch's own generator is left alone. The seed is that of workers."""
        keys: Any = ([(int(self._positions[row // self.views]), int(row % self.views)) for row in b] for b in batches)
        generator = torch.Generator().manual_seed(seed)  # or the loader would draw from torch's own
        options: dict[str, Any] = {"collate_fn": collate, "num_workers": self.num_workers, "generator": generator}
        return _in_one_line(DataLoader(self.dataset, batch_sampler=keys, **options))

    @property
    def kept(self) -> bool:
        """Whether a teacher keeps its outputs, so that batches shall tell their rows."""
        return self._kept is not None

    def keep(self, transform: str) -> None:
        """Have batches tell their rows, as long as the transform has this fingerprint."""
        self._kept = transform
        self.check_transform()

    def check_transform(self) -> None:
        """Refuse a transform that is no longer what it was when teachers kept their outputs."""
        if self.kept and self._kept != fingerprint(self.dataset.transform):
            raise InputError(
                "cache: train_transform is no longer what it was when the teacher's outputs were kept: it, or a "
                "callback, changes it as a fit goes on. Do without a cache, or without that change"
            )

    def parts(self) -> dict[str, str]:
        """All that the views depend on, by name."""
        return {
            "images": fingerprint([*map(contents, self.dataset.images)]),
            "samples": hashlib.sha256(self._indices.tobytes()).hexdigest(),
            "transform": fingerprint(self.dataset.transform),
            "seed": str(self.dataset.seed),
            "views": str(self.views),
        }


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

    def keys(self) -> Tensor:
        """This epoch's positions and views of all ranks, (K, 2), filled up to equal shares; rank r has every r-th."""
        order = torch.randperm(self.size * self.copies, generator=_generator(self.seed, self.epoch))
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        return self._keys(order % self.size, self.epoch * self.copies + order // self.size)

    def _keys(self, positions: Tensor, views: Tensor) -> Tensor:
        return torch.stack([positions, views if self.views is None else views % self.views], dim=1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(tuple, self.keys()[self.rank :: self.num_replicas][self.skip :].tolist())


class TwoStreamSampler(ViewSampler):
    """Keys of which every batch begins with labeled samples, and goes on with unlabeled ones.

    An epoch is one pass over ``copies`` views of the unlabeled samples. The labeled ones come round as often as it
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


def _in_one_line(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Torch hands on what a worker raised with all of its traceback as the message."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).strip().rsplit("\n", 1)[-1].removeprefix(f"{_NAME}: ")) from error


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


class ViewLoader(DataLoader[Batch]):
    """DataLoader of Batches that a run can resume in mid-epoch, and that fills labels in by index.

    Labels are looked up here, in the main process, since workers hold old copies of a dataset.

    Args:
        dataset: A :class:`ViewDataset`.
        labels: The label of each index.
        trainer: Tells how batches make up optimiser steps; None: each is one.
        views: The table in which teachers may keep their outputs.
        kwargs: As of DataLoader.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        labels: Labels,
        trainer: Trainer | None = None,
        views: Views | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("collate_fn", collate)
        super().__init__(dataset, **kwargs)  # type: ignore[arg-type]  # its type is that of a batch
        self.labels = labels
        self.trainer = trainer
        self.views = views
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
            yield from map(self._fill, self._batches())
            return
        epoch = sampler.epoch
        start = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (-1, 0)
        assert self.batch_size is not None
        sampler.skip = start * self.batch_size
        order = self.dataset.indices[sampler.keys()[:, 0]]  # type: ignore[attr-defined]
        for number, batch in enumerate(self._batches(), start):
            self._fill(batch)
            batch.mean_labels, batch.mean_pseudo, batch.mean_coarse, batch.mean_rows = self._means(order, number)
            self._done = (epoch, number + 1)
            yield batch

    def _fill(self, batch: Batch) -> Batch:
        if self.views is not None and self.views.kept:
            batch.rows = self.views.rows(batch)
        return self.labels.fill(batch)

    def _batches(self) -> Iterator[Batch]:
        if self.views is not None:
            self.views.check_transform()
        return _in_one_line(super().__iter__())

    def _means(self, order: Tensor, number: int) -> tuple[float, float, float, float]:
        """Labels, pseudo-labels, coarse ones and rows of a batch: means over those of its step on all ranks."""
        assert isinstance(self.sampler, ViewSampler)
        window, last = 1, len(self)
        if self.trainer is not None:
            window = self.trainer.accumulate_grad_batches
            last = int(min(last, self.trainer.num_training_batches))
        ranks = self.sampler.num_replicas
        rows = (self.batch_size or 1) * ranks
        first = number // window * window
        end = max(min(first + window, last), number + 1)
        index = order[first * rows : end * rows]
        batches = ranks * (end - first)
        labels, pseudo, coarse = (count / batches for count in self.labels.count(index))
        return labels, pseudo, coarse, len(index) / batches
