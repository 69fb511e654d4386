"""The dataset of views with dense labels, which move with their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_image

from kd_lightning.batch import IGNORE_INDEX, Batch
from kd_lightning.data.sources.dense_labels import LabelRules, read_labeled
from kd_lightning.data.sources.images import Images
from kd_lightning.data.sources.items import IMAGE_KEYS, STRONG_INPUTS, Entries
from kd_lightning.data.transforms.base import BatchTransform, plain, stack
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.views.dataset import CHUNK, ViewDataset, uses_torch_rng_only
from kd_lightning.data.views.nested import pad_alike, split_teacher_inputs, stack_inputs, stack_labels, to_inputs
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, describe

_POSITIONS = "positions"
"""Entry of a sample by which the dataset finds positions from outside, and moves of the strong view."""
_FIRST = 2**20
"""Number of the first position: no fill of new pixels is likely to be as large. float32 holds the numbers exactly."""

_TRIED = 8
"""Number of samples that are read for the shape of labels where no labels may be seen."""


class DenseViewDataset(ViewDataset):
    """Views of samples with dense labels by key (position, view).

    A transform moves inputs and labels together. A whole-batch transform moves masks by the draws of their images. Any
    other transform gets a mapping, and returns one: ``image`` (``torchvision.tv_tensors.Image``) and ``mask``
    (``tv_tensors.Mask``), or the entries of a sample of several inputs with ``labels`` (``mask`` for a mask). Positions
    of a mask that come from outside of it have no label.

    The strong view is made from the weak one. Its transform must leave labels where they are: it may change colours or
    tokens.

    Labels of samples that training may not see are not used: they are all -100 before any transform, so that no
    transform can show them.

    Args:
        images: Parts of the source. Indices count through all of them.
        indices: Index of the sample at each position, (N,).
        transform: Augmentation. None if samples are tensors and stay as they are.
        seed: Seed of the augmentation.
        strong_transform: Augmentation of the weak view for a second view of the same shape. Default: None, which means
            no second view.
        device: As in :class:`ViewDataset`.
        pad_token: As in :class:`ViewDataset`.
        visible: Whether the labels of each index may be seen, (M,) booleans.
        rules: How labels are read.
    """

    is_dense = True

    def __init__(
        self,
        images: Sequence[Images],
        indices: Tensor,
        transform: Any,
        seed: int,
        strong_transform: Any = None,
        device: torch.device | None = None,
        pad_token: int = 0,
        *,
        visible: Tensor,
        rules: LabelRules,
    ) -> None:
        super().__init__(images, indices, transform, seed, None, device, pad_token)
        self.visible = visible
        self.rules = rules
        self.strong_transform = strong_transform
        if isinstance(transform, BatchTransform):
            transform.check_masks()
        if isinstance(strong_transform, BatchTransform):
            strong_transform.check_masks()
        elif strong_transform is not None:
            self._single[1] = strong_transform
            self._torch_rng_only &= uses_torch_rng_only(strong_transform)
            self.device = None

    @property
    def more_tensors(self) -> int:
        """Number of tensors of a view beyond one for each transform: other inputs, and the labels."""
        return super().more_tensors + 1

    def of(self, indices: Tensor, transform: Any) -> DenseViewDataset:
        """Return a dataset of other samples under another transform, without strong views, on the CPU."""
        own: dict[str, Any] = {"visible": self.visible, "rules": self.rules, "pad_token": self.pad_token}
        return DenseViewDataset(self.images, indices, transform, self.seed, **own)

    def _read(self, index: Tensor, view: Tensor) -> Batch:
        if 0 in self._whole:
            draws = Draws(self.seed, index, view)
            images, masks = self._read_moved(index, draws)
            batch = Batch(images, masks, index, view)
            return batch if self.device is not None else self._finish(batch, draws)
        with self._kept_generators():
            samples = [self._read_sample(*pair) for pair in zip(index.tolist(), view.tolist(), strict=True)]
        inputs, labels, strong = zip(*samples, strict=True)
        x, teacher_inputs = split_teacher_inputs(stack_inputs(inputs, pad_token=self.pad_token))
        batch = Batch(x, stack_labels(labels), index, view, teacher_inputs=teacher_inputs)
        if 1 in self._single:
            batch.x_strong = split_teacher_inputs(stack_inputs(strong, pad_token=self.pad_token))[0]
            batch.x, batch.x_strong = pad_alike(batch.x, batch.x_strong, self.pad_token)
        return self._with_strong(batch, Draws(self.seed, index, view))

    def finish(self, batch: Batch) -> Batch:
        """Move a batch to the device, and run the whole-batch transforms there, if the dataset has a device."""
        if self.device is None:
            return batch
        assert batch.index is not None
        assert batch.view is not None
        draws = Draws(self.seed, batch.index, batch.view, self.device)
        return self._checked(self._finish(batch.to(self.device), draws))

    # Labels.

    def _read_labeled(self, sample: int, *, as_pixels: bool) -> tuple[Any, Tensor]:
        """Read inputs and labels. Labels that may not be seen, or are missing, are -100, or NaN where they are floats.

        Raises:
            InputError: If a mask has another size than its image.
        """
        visible = bool(self.visible[sample]) if sample < len(self.visible) else False
        inputs, label = read_labeled(self.images, sample, self.rules, visible=visible, as_pixels=as_pixels)
        if isinstance(inputs, Mapping) and STRONG_INPUTS in inputs:
            raise InputError(f"{STRONG_INPUTS} of sample {sample} may move its dense labels; give a strong_transform")
        if label is None:
            return inputs, self._nothing(inputs)
        size = _size_of(inputs)
        moves = size is not None and label.ndim > 1 and self.transform is not None
        if moves and [*label.shape[-2:]] != size:
            raise InputError(
                f"dense: labels must have the height and width of their image, {size}, got {[*label.shape]} for sample "
                f"{sample}"
            )
        return inputs, label

    def _nothing(self, inputs: Any) -> Tensor:
        """Return the labels of a sample without any, in the form that those of other samples have."""
        kind, shape = self._form
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if len(shape) > 1 and (size := _size_of(inputs)) is not None:
            shape = [*shape[:-2], *size]
        elif mask is not None and len(shape) == 1:
            shape = [len(mask)]
        return torch.full(shape, float("nan") if kind.is_floating_point else IGNORE_INDEX, dtype=kind)

    @cached_property
    def _form(self) -> tuple[torch.dtype, list[int]]:
        """Type and shape of labels: of a sample whose labels may be seen, else of one of the first; not the labels."""
        for sample in [*self.visible.nonzero().flatten()[:1].tolist(), *range(min(len(self.visible), _TRIED))]:
            with suppress(InputError):  # of labels that may not be seen
                label = read_labeled(self.images, sample, self.rules, visible=True, as_pixels=False)[1]
                if label is not None:
                    return label.dtype, [*label.shape]
        several = isinstance(read_labeled(self.images, 0, self.rules, visible=False, as_pixels=False)[0], Mapping)
        return torch.int64, [1] if several else [1, 1]

    # Whole-batch transforms.

    def _read_moved(self, index: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Read images and masks, and run the first steps, which bring them to one size."""
        head = self._whole[0][0]
        parts: list[tuple[Any, Any]] = []
        images: list[Tensor] = []
        labels: list[Tensor] = []
        size = 0
        for row, sample in enumerate(index.tolist(), 1):
            image, label = self._read_labeled(sample, as_pixels=True)
            images.append(image)
            labels.append(label)
            size += image.nbytes + label.nbytes
            if head is not None and (size >= CHUNK or row == len(index)):
                rows = torch.arange(row - len(images), row)
                parts.append(_move(head, images, labels, draws.select(rows)))
                images, labels, size = [], [], 0
        if head is not None:
            images = [image for part, _ in parts for image in part]
            labels = [label for _, part in parts for label in part]
        return stack(images), stack_labels(labels)

    def _finish(self, batch: Batch, draws: Draws) -> Batch:
        """Run the steps that take images of one size."""
        tail = self._whole[0][1]
        if tail is not None:
            assert batch.y is not None
            images, labels = _move(tail, batch.x, batch.y, draws)
            batch = replace(batch, x=images, y=labels)
        if 1 in self._single:
            assert batch.index is not None
            assert batch.view is not None
            keys = [*zip(batch.index.tolist(), batch.view.tolist(), strict=True)]
            with self._kept_generators():
                strong = [self._strengthen(batch.x[n], batch.y[n], *key) for n, key in enumerate(keys)]  # type: ignore[index]
            return replace(batch, x_strong=split_teacher_inputs(stack_inputs(strong))[0])
        return self._with_strong(batch, draws)

    def _with_strong(self, batch: Batch, draws: Draws) -> Batch:
        """Make the strong view by a whole-batch transform, if there is one."""
        if not isinstance(self.strong_transform, BatchTransform):
            return batch
        if not isinstance(batch.x, Tensor) or batch.x.ndim != 4:
            raise InputError(
                f"strong_transform: whole-batch transforms take images (B, C, H, W), got {describe(batch.x)}; a "
                "transform of one sample takes any inputs"
            )
        draws = draws.stream(-1)
        height, width = batch.x.shape[-2:]
        positions = torch.arange(height * width, device=batch.x.device).view(1, height, width)
        positions = positions.expand(len(batch), -1, -1)
        moved = self.strong_transform.masks(positions, draws.copy())
        if moved is not positions and not torch.equal(moved, positions):  # type: ignore[arg-type]
            raise _moves_labels()
        batch.x_strong = self.strong_transform(batch.x, draws)
        return batch

    # Any other transform.

    def _read_sample(self, sample: int, view: int) -> tuple[Inputs, Tensor, Inputs]:
        """Return inputs and labels of a view, and the inputs of its strong view, if its transform takes one sample."""
        inputs, label = self._read_labeled(sample, as_pixels=False)
        if self.transform is None:
            x = plain(inputs) if isinstance(inputs, Tensor) else to_inputs(inputs, sample)
        else:
            x, label = self._transform(inputs, label, sample, view)
        mask = x.get("attention_mask") if isinstance(x, Mapping) else None
        if isinstance(mask, Tensor) and label.ndim == mask.ndim == 1 and label.shape != mask.shape:
            raise InputError(
                f"dense: sample {sample} must have a label for each token of attention_mask, {[*mask.shape]}, got "
                f"{[*label.shape]}"
            )
        strong = self._strengthen(split_teacher_inputs(x)[0], label, sample, view) if 1 in self._single else x
        return x, label, strong

    def _transform(self, inputs: Any, label: Tensor, sample: int, view: int) -> tuple[Inputs, Tensor]:
        entries, key = _entries(inputs, label)
        is_mask = isinstance(entries[key], tv_tensors.Mask)
        if is_mask:
            entries[_POSITIONS] = tv_tensors.Mask(torch.full(label.shape[-2:], _FIRST, dtype=torch.int32))
        self._seed(self._key(sample, view, 0))
        found, moved, positions = _take(self.transform(entries), key, sample)
        if label.is_floating_point() != moved.is_floating_point():
            raise InputError(
                f"a transform must return dense labels of the type that it gets, {label.dtype}, got {moved.dtype} for "
                f"sample {sample}"
            )
        if is_mask and positions is not None and positions.shape[-2:] == moved.shape[-2:]:
            outside = positions != _FIRST
            moved = moved.masked_fill(outside, float("nan") if moved.is_floating_point() else IGNORE_INDEX)
        found = type(inputs)(found) if type(inputs) in (dict, Entries) else Entries(found)
        return to_inputs(found, sample), moved

    def _strengthen(self, x: Inputs, label: Tensor, sample: int, view: int) -> Inputs:
        """Return the strong view of a weak one."""
        entries, key = _entries(x, label)
        numbers = None
        if isinstance(entries[key], tv_tensors.Mask):
            height, width = label.shape[-2:]
            numbers = torch.arange(_FIRST, _FIRST + height * width, dtype=torch.int32).view(height, width)
            entries[_POSITIONS] = tv_tensors.Mask(numbers)
        self._seed(self._key(sample, view, 1))
        found, moved, positions = _take(self.strong_transform(entries), key, sample)
        if not _equal(moved, label) or (positions is not None and not torch.equal(positions, numbers)):  # type: ignore[arg-type]
            raise _moves_labels()
        return to_inputs(found if isinstance(x, Mapping) else Entries(found), sample)


def _move(transform: BatchTransform, images: Any, labels: Any, draws: Draws) -> tuple[Any, Any]:
    """Run a whole-batch transform on images and their labels (H, W), or (..., H, W)."""
    if any(label.ndim < 2 for label in labels):
        raise InputError(
            f"dense: whole-batch transforms move masks (H, W), got labels {[*labels[0].shape]}; a transform of one "
            "sample takes any labels"
        )
    masks = all(label.ndim == 2 and not label.is_floating_point() for label in labels)
    if masks:
        return transform.with_masks(images, labels, draws)
    numbers = [torch.arange(label.shape[-2:].numel(), device=label.device).view(label.shape[-2:]) for label in labels]
    images, places = transform.with_masks(images, numbers, draws)
    moved = []
    for label, place in zip(labels, places, strict=True):
        values = label.flatten(-2)[..., place.clamp_min(0)]
        moved.append(values.masked_fill(place < 0, float("nan") if label.is_floating_point() else IGNORE_INDEX))
    return images, stack_labels(moved) if isinstance(places, Tensor) else moved


def _size_of(inputs: Any) -> list[int] | None:
    """Height and width of inputs that are one image; None for any other."""
    if isinstance(inputs, Image.Image):
        return [inputs.height, inputs.width]
    if isinstance(inputs, np.ndarray) and inputs.ndim in (2, 3):
        return [*inputs.shape[:2]]
    return [*inputs.shape[-2:]] if isinstance(inputs, Tensor) and inputs.ndim == 3 else None


def _entries(inputs: Any, label: Tensor) -> tuple[dict[str, Any], str]:
    """Return what a transform of one sample gets, and the name of the labels in it.

    Torchvision's transforms move images and masks by their classes, and leave other tensors as they are. So tensors
    of the size of a mask are images under the usual names, and masks under others. PIL images become tensors: Pillow
    rounds positions in another way than torch does for the mask.
    """
    if not isinstance(inputs, Mapping):
        image = to_image(inputs) if isinstance(inputs, np.ndarray | Image.Image) else inputs
        if type(image) is Tensor and image.ndim >= 3:
            image = tv_tensors.Image(image)
        return {"image": image, "mask": tv_tensors.Mask(label) if label.ndim > 1 else label}, "mask"
    key = "mask" if label.ndim > 1 and "mask" not in inputs else "labels"
    entries = {**inputs}
    spatial = False
    for name, value in inputs.items() if label.ndim > 1 else ():
        if isinstance(value, Image.Image):
            spatial, entries[name] = True, to_image(value)
        elif isinstance(value, Tensor) and value.ndim > 1 and value.shape[-2:] == label.shape[-2:]:
            spatial = True
            if type(value) is Tensor:
                entries[name] = tv_tensors.Image(value) if name in IMAGE_KEYS else tv_tensors.Mask(value)
    entries[key] = tv_tensors.Mask(label) if spatial else label
    return entries, key


def _take(found: Any, key: str, sample: int) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Return the inputs, labels and positions of what a transform returns."""
    if not isinstance(found, Mapping) or not isinstance(found.get(key), Tensor):
        got = describe(found) if isinstance(found, Mapping | tuple | list | Tensor) else type(found).__name__
        raise InputError(
            f"a transform of one sample with dense labels gets a mapping and must return one, with a tensor {key}, got "
            f"{got} for sample {sample}"
        )
    inputs = {name: value for name, value in found.items() if name not in (key, _POSITIONS)}
    label, positions = plain(found[key]), found.get(_POSITIONS)
    label = label.float() if label.is_floating_point() else label.long()
    return inputs, label, plain(positions) if isinstance(positions, Tensor) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether labels are equal; NaN is equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _moves_labels() -> InputError:
    return InputError(
        "strong_transform must leave dense labels where they are, since it gets the weak view: it may change colours, "
        "but not crop, flip, turn or resize; put these into train_transform"
    )
