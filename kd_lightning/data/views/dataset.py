"""The dataset of views: the pixels of a view depend on (seed, index, view) alone."""

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
from kd_lightning.data.views.worker_limits import share
from kd_lightning.errors import InputError

Key = int | tuple[int, int]
_MODULE_ATTRIBUTES = vars(nn.Module())  # those that every module has
_ERROR_NAME = f"{InputError.__module__}.{InputError.__qualname__}"


@dataclass(slots=True)
class Sample:
    """One view of one sample. ``index`` and ``view`` are ints: a tensor for each takes longer than the augmentation."""

    x: Tensor
    index: int
    view: int
    x_strong: Tensor | None = None


class ViewDataset(Dataset[Sample]):
    """Samples by key (position, view). The same (seed, index, view) always gives the same pixels.

    It holds no labels, so none can leak into training. A key without a view means view 0.

    Args:
        images: Parts of the source. Indices count through all of them.
        indices: Index of the sample at each position, (N,).
        transform: Augmentation from an image to a tensor. None if images are tensors and stay as they are.
        seed: Seed of the augmentation.
        strong_transform: Augmentation for a second view of each sample, of the same shape. Default: None, which means
            no second view.
    """

    def __init__(
        self, images: Sequence[Images], indices: Tensor, transform: Any, seed: int, strong_transform: Any = None
    ) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.strong_transform = strong_transform
        self._torch_rng_only = uses_torch_rng_only(transform) and uses_torch_rng_only(strong_transform)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """The samples of a batch; in the main process, random generators are restored afterwards."""
        in_worker = get_worker_info() is not None  # nothing else uses a worker's generators
        torch_state = None if in_worker else torch.get_rng_state()
        other_states = None if in_worker or self._torch_rng_only else (random.getstate(), np.random.get_state())
        pairs = [(key, 0) if isinstance(key, int) else key for key in keys]
        indices = self.indices[[position for position, _ in pairs]].tolist()
        samples = [self._load(index, view) for index, (_, view) in zip(indices, pairs, strict=True)]
        if torch_state is not None:
            torch.set_rng_state(torch_state)
        if other_states is not None:
            random.setstate(other_states[0])
            np.random.set_state(other_states[1])
        return samples

    def _load(self, index: int, view: int) -> Sample:
        image = read_image(self.images, index)
        x = self._apply(self.transform, image, index, struct.pack("<3q", self.seed, index, view))
        if self.strong_transform is None:
            return Sample(x, index, view)
        strong = self._apply(self.strong_transform, image, index, struct.pack("<4q", self.seed, index, view, 1))
        if strong.shape != x.shape:
            shapes = f"{[*strong.shape]} and {[*x.shape]}"
            raise InputError(f"strong_transform must return the shape that train_transform returns, got {shapes}")
        return Sample(x, index, view, strong)

    def _apply(self, transform: Any, image: Any, index: int, key: bytes) -> Tensor:
        if transform is not None:
            seed = zlib.crc32(key)
            # torch.manual_seed also queues a call for every accelerator
            torch.default_generator.manual_seed(seed)
            if not self._torch_rng_only:  # these two are the most expensive part of a replay
                random.seed(seed)
                np.random.seed(seed)
            image = transform(image)
        if not isinstance(image, Tensor):
            raise InputError(f"a transform must return a tensor, got {type(image).__name__} for sample {index}")
        return image if type(image) is Tensor else image.as_subclass(Tensor)


def uses_torch_rng_only(transform: Any) -> bool:
    """Whether a transform uses no random generator but torch's.

    This holds if all its parts are modules of torch or torchvision (v2), without functions or hooks of other origin.

    >>> from torchvision.transforms import v2
    >>> uses_torch_rng_only(v2.Compose([v2.RandomHorizontalFlip()])), uses_torch_rng_only(v2.Lambda(abs))
    (True, False)
    """
    if transform is None:
        return True
    origin = type(transform).__module__
    if not isinstance(transform, nn.Module) or not origin.startswith(("torchvision.transforms.v2.", "torch.nn.")):
        return False
    lists = [value for value in vars(transform).values() if isinstance(value, list | tuple)]
    inner = [*transform.children(), *(value for values in lists for value in values if callable(value))]
    functions = [value for name, value in vars(transform).items() if callable(value) and name not in _MODULE_ATTRIBUTES]
    functions += [*transform._forward_pre_hooks.values(), *transform._forward_hooks.values()]
    return not functions and all(map(uses_torch_rng_only, inner))


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch without labels."""
    try:
        x = share(torch.stack([sample.x for sample in samples]))
    except RuntimeError as error:
        shapes = sorted({tuple(sample.x.shape) for sample in samples})
        raise InputError(f"samples must have one shape after their transform, got {shapes[:3]}") from error
    strong = [sample.x_strong for sample in samples if sample.x_strong is not None]
    return Batch(
        x,
        index=share(torch.tensor([sample.index for sample in samples])),
        view=share(torch.tensor([sample.view for sample in samples])),
        x_strong=share(torch.stack(strong)) if strong else None,
    )


def shorten_worker_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches; reduce the message of an InputError to its last line.

    Torch puts the whole traceback of a worker process into the message of its error.
    """
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).strip().rsplit("\n", 1)[-1].removeprefix(f"{_ERROR_NAME}: ")) from error
