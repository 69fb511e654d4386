"""The dataset of views: the pixels of a view depend on (seed, index, view) alone."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from kd_lightning.batch import Batch
from kd_lightning.data.sources.images import Images, has_several_inputs, part_of, read_image
from kd_lightning.data.sources.items import STRONG_INPUTS, split_strong
from kd_lightning.data.sources.memory import rows_of
from kd_lightning.data.sources.pixels import read_pixels
from kd_lightning.data.transforms.base import BatchTransform, Compose, plain, stack
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.transforms.mix import Mix, check_plan, mix_images
from kd_lightning.data.views.nested import (
    count_tensors,
    pad_alike,
    shapes_of,
    split_teacher_inputs,
    stack_inputs,
    stack_labels,
    to_inputs,
)
from kd_lightning.data.views.partners import Partners
from kd_lightning.data.views.worker_limits import share
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, describe, map_inputs

Key = int | tuple[int, int]
Keys = np.ndarray[Any, np.dtype[np.int64]]
_MODULE_ATTRIBUTES = vars(nn.Module())  # those that every module has
_TORCH_RNG = ("torchvision.transforms.v2.", "torch.nn.", "kd_lightning.data.transforms.")
"""Modules whose transforms use no random generator but torch's."""
_ERROR_NAME = f"{InputError.__module__}.{InputError.__qualname__}"
CHUNK = 2**25
"""Bytes of images of different sizes that are in memory at a time, and one image more."""
_AT_ONCE = 2**19
"""Bytes of small images that are augmented together: more do not stay in a processor's cache."""
_STRONG, _MIX = -1, -3
"""Streams of random numbers: of a strong view, and of how a view is mixed."""


class ViewDataset(Dataset[Batch]):
    """Views of samples by key (position, view). The same (seed, index, view) always gives the same pixels.

    The inputs of a sample may also be a mapping or tuple. A transform gets all of them; without one, tensors are
    stacked name by name. The entry ``teacher_inputs`` of a mapping becomes that of the batch. The entry ``x_strong`` is
    the sample's own strong view, which only ``strong_transform`` gets.

    Token sequences of different lengths are padded to the longest of the batch, see
    :func:`~kd_lightning.data.views.nested.stack_inputs`.

    It holds no labels, so none can leak into training; dense labels are in
    :class:`~kd_lightning.data.views.dense_dataset.DenseViewDataset`. A key without a view means view 0. A whole-batch
    transform (:class:`~kd_lightning.data.transforms.BatchTransform`) runs once for all views of a batch; any other
    transform runs for each view, with all generators seeded.

    Args:
        images: Parts of the source. Indices count through all of them.
        indices: Index of the sample at each position, (N,).
        transform: Augmentation from a sample to a tensor, or to a mapping or tuple of tensors. None if samples are
            tensors and stay as they are.
        seed: Seed of the augmentation.
        strong_transform: Augmentation for a second view of each sample, of the same shape. Default: None, which means
            no second view.
        device: Device on which whole-batch transforms run, in :meth:`finish`. Default: None, which means that they run
            where the images are read.
        pad_token: Number that pads ``input_ids``.
        mix: Mixes each view with the same view of another sample. Whole-batch transforms then run where the images are
            read. Default: None, which means that views are not mixed.
        partners: What each view is mixed with. Needed with ``mix``.
        reads_strong: Whether strong views that samples have themselves are in the batches, without a
            ``strong_transform``, too. Default: False, as in evaluation.
    """

    is_dense = False
    """Whether batches have dense labels."""

    def __init__(
        self,
        images: Sequence[Images],
        indices: Tensor,
        transform: Any,
        seed: int,
        strong_transform: Any = None,
        device: torch.device | None = None,
        pad_token: int = 0,
        mix: Mix | None = None,
        partners: Partners | None = None,
        reads_strong: bool = False,
    ) -> None:
        self.reads_strong = reads_strong or strong_transform is not None
        self.mix = mix
        self.partners = partners
        self.images = images
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.strong_transform = strong_transform
        self.pad_token = pad_token
        self._rows = rows_of(images)
        transforms = [transform] if strong_transform is None else [transform, strong_transform]
        whole = {
            number: _split(one)
            for number, one in enumerate(transforms)
            if isinstance(one, BatchTransform) or (one is None and self._rows is not None)
        }
        self._whole = whole
        self._single = {number: one for number, one in enumerate(transforms) if number not in whole}
        self._torch_rng_only = all(map(uses_torch_rng_only, self._single.values()))
        # on another device, both views begin with the same images, or each with a crop of its own
        alike = len({head is None for head, _ in whole.values()}) == 1
        self.device = device if alike and not self._single and mix is None else None

    @property
    def rows_at_once(self) -> int:
        """Number of views that are best read together. Of small images in memory, many take little longer than few."""
        if self._rows is None or self._single or not len(self._rows):
            return 1
        return max(1, _AT_ONCE // (4 * max(1, self._rows.values[0].numel())))

    @property
    def more_tensors(self) -> int:
        """Number of tensors of a view beyond one for each transform, by the first sample as the source returns it."""
        if self.mix is not None:
            return 2  # partner and share
        several = self._single and len(self) and has_several_inputs(*part_of(self.images, int(self.indices[0])))
        inputs, strong = split_strong(read_image(self.images, int(self.indices[0]))) if several else (None, None)
        count = count_tensors(inputs) if several else 1
        return (count - 1) * (1 + (self.strong_transform is not None or (self.reads_strong and strong is not None)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Batch:
        """Return one view. The fields have no dimension of the batch."""
        batch = self.__getitems__([key])
        return batch.map(lambda field: field[0])

    def __getitems__(self, keys: Sequence[Key] | Keys) -> Batch:
        """Return views as a batch without labels. In the main process, random generators stay as they are.

        Args:
            keys: Positions, or (position, view); (B, 2) as an array.
        """
        pairs = keys if isinstance(keys, np.ndarray) else np.array([(k, 0) if isinstance(k, int) else k for k in keys])
        index = self.indices[torch.from_numpy(pairs[:, 0])]
        view = torch.from_numpy(np.ascontiguousarray(pairs[:, 1]))
        if self.mix is not None and self.partners is not None:
            return self._mixed(index, view, self.partners(torch.from_numpy(pairs)), self.mix)
        batch = self._read(index, view)
        return batch if self.device is not None else self._checked(batch)

    def _read(self, index: Tensor, view: Tensor) -> Batch:
        views = self._read_whole(index, view) | self._read_single(index, view)
        x, teacher_inputs = split_teacher_inputs(views[0])
        strong = split_teacher_inputs(views[1])[0] if 1 in views else None
        if isinstance(strong, Mapping):
            x, strong = pad_alike(x, strong, self.pad_token)
        return Batch(x, index=index, view=view, x_strong=strong, teacher_inputs=teacher_inputs)

    def _mixed(self, index: Tensor, view: Tensor, partner: Tensor, mix: Mix) -> Batch:
        both = self._checked(self._read(torch.cat([index, partner]), torch.cat([view, view])))
        if not isinstance(both.x, Tensor) or both.teacher_inputs is not None:
            what = "teacher_inputs" if both.teacher_inputs is not None else describe(both.x)
            raise InputError(f"mix is for samples of one tensor, got {what}")
        weak, strong, rows = both.x, both.x_strong, len(index)
        for images in (weak,) if strong is None else (weak, strong):
            mix.check(images)
        share, pixels = mix.plan(Draws(self.seed, index, view).stream(_MIX), weak.shape[1:])
        check_plan(mix, share, rows)
        x = mix_images(weak[:rows], weak[rows:], pixels)
        x_strong = None if strong is None else mix_images(strong[:rows], strong[rows:], pixels)
        return Batch(x, index=index, view=view, x_strong=x_strong, partner=partner, share=share.float())

    def of(self, indices: Tensor, transform: Any) -> ViewDataset:
        """Return a dataset of other samples under another transform, without strong views, on the CPU."""
        return ViewDataset(self.images, indices, transform, self.seed, pad_token=self.pad_token)

    def finish(self, batch: Batch) -> Batch:
        """Move a batch to the device, and run the whole-batch transforms there, if the dataset has a device."""
        if self.device is None:
            return batch
        assert batch.index is not None
        assert batch.view is not None
        draws = Draws(self.seed, batch.index, batch.view, self.device)
        batch = batch.to(self.device)
        raw = {0: batch.x, 1: batch.x if batch.x_strong is None else batch.x_strong}
        views = {n: _run(tail, raw[n], _stream(draws, n)) for n, (_, tail) in self._whole.items()}
        return self._checked(replace(batch, x=views[0], x_strong=views.get(1)))

    def _checked(self, batch: Batch) -> Batch:
        if batch.x_strong is not None and shapes_of(batch.x_strong) != shapes_of(batch.x):
            strong, weak = (describe(map_inputs(lambda tensor: tensor[0], x)) for x in (batch.x_strong, batch.x))
            rule = f"{STRONG_INPUTS} of a sample must have the names and shapes of the other inputs"
            if self.strong_transform is not None:
                rule = "strong_transform must return the shape that train_transform returns"
            raise InputError(f"{rule}, got {strong} and {weak}")
        return batch

    # Whole-batch transforms.

    def _read_whole(self, index: Tensor, view: Tensor) -> dict[int, Tensor]:
        """Return the views of whole-batch transforms, (B, ...) each. With a device, their last steps are missing."""
        if not self._whole:
            return {}
        draws = Draws(self.seed, index, view)
        raw = self._heads(index, draws) if any(head for head, _ in self._whole.values()) else {}
        if len(raw) < len(self._whole):
            images = self._images(index)
            raw |= {number: images for number in self._whole if number not in raw}
        if self.device is not None:  # views without a crop of their own begin with the same images
            return raw if self._whole[0][0] is not None else {0: raw[0]}
        return {n: _run(tail, raw[n], _stream(draws, n)) for n, (_, tail) in self._whole.items()}

    def _images(self, index: Tensor) -> Tensor:
        """Read images of one size, (B, C, H, W)."""
        if self._rows is not None:
            return self._rows.read(index)
        return stack([read_pixels(self.images, number) for number in index.tolist()])

    def _heads(self, index: Tensor, draws: Draws) -> dict[int, Tensor]:
        """Read images of different sizes, a few at a time, and run the first steps, which bring them to one size."""
        heads = {number: head for number, (head, _) in self._whole.items() if head is not None}
        parts: dict[int, list[Tensor | list[Tensor]]] = {number: [] for number in heads}
        images: list[Tensor] = []
        size = 0
        for row, sample in enumerate(index.tolist(), 1):
            images.append(read_pixels(self.images, sample))
            size += images[-1].nbytes
            if size >= CHUNK or row == len(index):
                rows = torch.arange(row - len(images), row)
                for number, head in heads.items():
                    parts[number].append(_run(head, images, _stream(draws, number).select(rows)))
                images, size = [], 0
        return {number: _join(part) for number, part in parts.items()}

    # Any other transform.

    def _read_single(self, index: Tensor, view: Tensor) -> dict[int, Any]:
        """Return the views of transforms that take one sample, (B, ...) each."""
        views: dict[int, list[Inputs]] = {number: [] for number in self._single}
        without: list[int] = []  # samples without a strong view of their own
        with self._kept_generators():
            for sample, name in zip(index.tolist(), view.tolist(), strict=True) if views else ():
                image, strong = split_strong(read_image(self.images, sample), f"sample {sample}")
                transforms = self._single
                if strong is None:
                    without.append(sample)
                elif self.reads_strong:
                    transforms = {1: None, **transforms}
                for number, transform in transforms.items():
                    given = image if number == 0 or strong is None else strong
                    view_of = self._apply(transform, given, sample, self._key(sample, name, number))
                    views.setdefault(number, []).append(view_of)
        if self.reads_strong and 0 < len(without) < len(index):
            raise InputError(
                f"{STRONG_INPUTS}: all training samples or none must have it, sample {without[0]} has none"
            )
        return {number: stack_inputs(parts, pad_token=self.pad_token) for number, parts in views.items()}

    def _key(self, sample: int, view: int, number: int) -> bytes:
        """The key of a view's random numbers; ``number`` is 1 for the strong view."""
        return struct.pack("<3q", self.seed, sample, view) + (struct.pack("<q", 1) if number else b"")

    @contextmanager
    def _kept_generators(self) -> Iterator[None]:
        if not self._single or get_worker_info() is not None:  # nothing else uses a worker's generators
            yield
            return
        torch_state = torch.get_rng_state()
        other_states = None if self._torch_rng_only else (random.getstate(), np.random.get_state())
        yield
        torch.set_rng_state(torch_state)
        if other_states is not None:
            random.setstate(other_states[0])
            np.random.set_state(other_states[1])

    def _apply(self, transform: Any, image: Any, index: int, key: bytes) -> Inputs:
        if transform is not None:
            self._seed(key)
            # a copy of its own: the strong view begins with the same entries
            image = transform({**image} if isinstance(image, Mapping) else image)
        return plain(image) if isinstance(image, Tensor) else to_inputs(image, index)

    def _seed(self, key: bytes) -> None:
        """Seed the generators for a view."""
        seed = zlib.crc32(key)
        # torch.manual_seed also queues a call for every accelerator
        torch.default_generator.manual_seed(seed)
        if not self._torch_rng_only:  # these two are the most expensive part of a replay
            random.seed(seed)
            np.random.seed(seed)


def _split(transform: BatchTransform | None) -> tuple[BatchTransform | None, BatchTransform | None]:
    """Return the steps that take images of different sizes, and the others; None for none."""
    if isinstance(transform, Compose):
        return tuple(part if len(part.transforms) else None for part in transform.split())  # type: ignore[return-value]
    return (transform, None) if transform is not None and transform.takes_lists else (None, transform)


def _join(parts: list[Tensor | list[Tensor]]) -> Tensor:
    """Stack the images of all parts."""
    if len(parts) == 1 and isinstance(parts[0], Tensor):
        return parts[0]
    return stack([image for part in parts for image in part])


def _run(transform: BatchTransform | None, images: Any, draws: Draws) -> Any:
    return images if transform is None else transform(images, draws)


def _stream(draws: Draws, number: int) -> Draws:
    """The random numbers of a view: of the first, or of the strong one."""
    return draws.stream(_STRONG) if number else draws


def uses_torch_rng_only(transform: Any) -> bool:
    """Whether a transform uses no random generator but torch's.

    This holds if all its parts are modules of torch, torchvision (v2) or this package, without functions or hooks of
    other origin.

    >>> from torchvision.transforms import v2
    >>> uses_torch_rng_only(v2.Compose([v2.RandomHorizontalFlip()])), uses_torch_rng_only(v2.Lambda(abs))
    (True, False)
    """
    if transform is None:
        return True
    origin = type(transform).__module__
    if not isinstance(transform, nn.Module) or not origin.startswith(_TORCH_RNG):
        return False
    lists = [value for value in vars(transform).values() if isinstance(value, list | tuple)]
    inner = [*transform.children(), *(value for values in lists for value in values if callable(value))]
    functions = [value for name, value in vars(transform).items() if callable(value) and name not in _MODULE_ATTRIBUTES]
    functions += [*transform._forward_pre_hooks.values(), *transform._forward_hooks.values()]
    return not functions and all(map(uses_torch_rng_only, inner))


def collate(samples: Batch | Sequence[Batch]) -> Batch:
    """Return the batch of a dataset, in memory that processes share. Single views are stacked, and padded by 0."""
    if isinstance(samples, Batch):
        return samples if get_worker_info() is None else samples.map(share)
    index, view = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("index", "view"))
    inputs = {name: [getattr(sample, name) for sample in samples] for name in ("x", "x_strong", "teacher_inputs")}
    mixed = {
        name: None if getattr(samples[0], name) is None else torch.stack([getattr(sample, name) for sample in samples])
        for name in ("partner", "share")
    }
    stacked: dict[str, Any] = mixed | {
        n: None if parts[0] is None else stack_inputs(parts) for n, parts in inputs.items()
    }
    labels = [sample.y for sample in samples]
    y = None if labels[0] is None else stack_labels(labels)  # type: ignore[arg-type]
    return collate(Batch(**stacked, y=y, index=index, view=view))


def shorten_worker_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches; reduce the message of an InputError to its last line.

    Torch puts the whole traceback of a worker process into the message of its error.
    """
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).strip().rsplit("\n", 1)[-1].removeprefix(f"{_ERROR_NAME}: ")) from error
