"""Replayable augmentation: what a view looks like, and in which order views come, follow from seeds alone."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from kd_lightning.batch import Batch
from kd_lightning.data.sources.images import Images, read_image
from kd_lightning.errors import InputError

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


def _in_one_line(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Torch hands on what a worker raised with all of its traceback as the message."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).strip().rsplit("\n", 1)[-1].removeprefix(f"{_NAME}: ")) from error
