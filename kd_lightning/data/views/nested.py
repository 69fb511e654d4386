"""Samples whose inputs are a mapping or tuple of tensors: from what a dataset or a transform returns to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.items import TEACHER_INPUTS, Entries
from kd_lightning.data.sources.pixels import row_of
from kd_lightning.data.transforms.base import plain, stack
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, describe

_WHAT = "samples after their transform"


def to_inputs(value: Any, index: int) -> Inputs:
    """Return what a transform, or a dataset without one, returns for a sample as tensors.

    Arrays and lists of numbers become tensors; an array that stands alone does so if it has one dimension, and is no
    picture. Entries of a mapping that hold no numbers (paths, texts), and single numbers, are left out.

    Args:
        value: A tensor, or a mapping or tuple of tensors.
        index: Index of the sample, for messages.

    Raises:
        InputError: If there is no tensor, or a picture among the inputs.
    """
    if isinstance(value, Tensor):
        return plain(value)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "biuf":
        return row_of(value)
    found = None if isinstance(value, np.ndarray) else _tensors(value, "", index)
    if found is None or isinstance(found, Tensor):  # a list of numbers is no mapping or tuple of tensors
        got = describe(value) if isinstance(value, Mapping | tuple) else type(value).__name__
        raise InputError(
            f"a transform must return a tensor, got {got} for sample {index}; a mapping or tuple of tensors is allowed"
        )
    return Entries(found) if isinstance(value, Entries) else found


def _tensors(value: Any, name: str, index: int) -> Any:
    """Return a tensor, or a mapping or tuple of tensors; None for a value without numbers."""
    if isinstance(value, Tensor):
        return plain(value)
    if isinstance(value, np.ndarray):
        native = value.dtype.newbyteorder("=")  # torch has neither other byte orders nor negative strides
        return torch.from_numpy(np.array(value, native, order="C")) if value.dtype.kind in "biufc" else None
    if isinstance(value, Mapping):
        parts = {key: _tensors(part, f"{name}.{key}" if name else str(key), index) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None} or None
    if isinstance(value, Image.Image):
        raise InputError(
            f"a transform must return tensors, but {name or 'an input'} of sample {index} is a picture ({value.mode}, "
            f"{value.size}); give a transform of one sample, which gets all inputs, or convert it in the dataset"
        )
    if isinstance(value, list) and value and is_number(value):
        try:
            return torch.tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{name or 'a list'} of sample {index} must be numbers of one shape: {error}") from error
    if isinstance(value, tuple | list) and value:
        parts_of = [_tensors(part, f"{name}[{number}]", index) for number, part in enumerate(value)]
        return None if any(part is None for part in parts_of) else tuple(parts_of)
    return None


def count_tensors(value: Any) -> int:
    """Return how many tensors the inputs of a sample become, as far as that is seen without a transform; at least 1."""
    return max(1, _count(value))


def _count(value: Any) -> int:
    if isinstance(value, Mapping | tuple | list) and not (isinstance(value, list) and is_number(value)):
        return sum(map(_count, value.values() if isinstance(value, Mapping) else value))
    return int(isinstance(value, Tensor | np.ndarray | Image.Image | list))


def is_number(value: Any) -> bool:
    """Whether a value is a number, or the first of nested lists holds one."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float)


def stack_inputs(samples: Sequence[Inputs], name: str = "", pad_token: int = 0) -> Any:
    """Stack the inputs of samples, name by name. Token sequences are padded to the longest of them.

    These are the tensors of a mapping with ``attention_mask`` (T,) whose length is that of the mask in each sample.
    ``input_ids`` are padded by ``pad_token``, ``attention_mask`` and others by 0.

    Args:
        samples: Inputs of B samples, of one form.
        name: Name of the inputs within the sample, for messages.
        pad_token: Number that pads ``input_ids``.

    Returns:
        A tensor (B, ...), or a mapping or tuple of such tensors. The order of names is that of the first sample.

    Raises:
        InputError: If samples have other names, or tensors of one name another shape or type. The message names it.
    """
    first = samples[0]
    if isinstance(first, Tensor) and all(isinstance(sample, Tensor) for sample in samples):
        what = f"{name} of {_WHAT}" if name else _WHAT
        if first.ndim > 2 and not name:
            return stack(samples, what)  # type: ignore[arg-type]
        remedy = "pad it to one length in the dataset, or return a mapping of tensors with their attention_mask"
        return stack(samples, what, remedy)  # type: ignore[arg-type]
    forms = {_form(sample) for sample in samples}
    if len(forms) > 1:
        where = f"{name} of {_WHAT}" if name else _WHAT
        raise InputError(f"{where} must have the same entries, got {' and '.join(sorted(forms)[:3])}")
    if isinstance(first, Mapping):
        named = {key: [sample[key] for sample in samples] for key in first}
        lengths = _lengths(named.get("attention_mask"))
        stacked = {}
        for key, parts in named.items():
            if lengths is not None and _lengths(parts, ndim=None) == lengths:
                parts = pad(parts, max(lengths), pad_token if str(key).endswith("input_ids") else 0)
            stacked[key] = stack_inputs(parts, f"{name}.{key}" if name else str(key), pad_token)
        return Entries(stacked) if isinstance(first, Entries) else stacked
    return tuple(stack_inputs(parts, f"{name}[{n}]", pad_token) for n, parts in enumerate(zip(*samples, strict=True)))


def _lengths(parts: Sequence[Any] | None, ndim: int | None = 1) -> list[int] | None:
    """Return the lengths of tensors, if these differ; None if they are equal, or if some are no tensors.

    Args:
        parts: One of each sample.
        ndim: Number of dimensions that they must have. None for any.
    """
    if parts is None or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        return None
    lengths = [len(part) for part in parts]
    ok = ndim is None or all(part.ndim == ndim for part in parts)
    return lengths if ok and len({*lengths}) > 1 else None


def pad(parts: Sequence[Tensor], length: int, value: float) -> list[Tensor]:
    """Return tensors (T, ...) with rows of one value behind them, so that all have one length."""
    return [
        part if len(part) == length else torch.cat([part, part.new_full((length - len(part), *part.shape[1:]), value)])
        for part in parts
    ]


def stack_labels(labels: Sequence[Tensor]) -> Tensor:
    """Stack the dense labels of samples. Those of token sequences (T,) are padded by -100, or NaN if they are floats.

    Raises:
        InputError: If their shapes or types do not fit.
    """
    lengths = _lengths(labels)
    if lengths is not None:
        missing = float("nan") if labels[0].is_floating_point() else IGNORE_INDEX
        labels = pad(labels, max(lengths), missing)
    return stack(labels, "dense labels of a batch", "a resize or a crop of inputs and labels brings them to one size")


def pad_alike(first: Any, second: Any, pad_token: int = 0) -> tuple[Any, Any]:
    """Pad two batches of token sequences to the same length, where theirs differ; others stay as they are."""
    masks = [x.get("attention_mask") if isinstance(x, Mapping) else None for x in (first, second)]
    if any(not isinstance(mask, Tensor) or mask.ndim != 2 for mask in masks):
        return first, second
    lengths = [mask.shape[1] for mask in masks]  # type: ignore[union-attr]
    if lengths[0] == lengths[1]:
        return first, second
    padded = []
    for x, length in zip((first, second), lengths, strict=True):
        long = {
            key: pad([part.transpose(0, 1)], max(lengths), pad_token if str(key).endswith("input_ids") else 0)[0]
            for key, part in x.items()
            if isinstance(part, Tensor) and part.ndim > 1 and part.shape[1] == length
        }
        padded.append(type(x)({**x, **{key: part.transpose(0, 1).contiguous() for key, part in long.items()}}))
    return padded[0], padded[1]


def _form(sample: Inputs) -> str:
    if isinstance(sample, Tensor):
        return "a tensor"
    names = ", ".join(sorted(map(str, sample))) if isinstance(sample, Mapping) else f"{len(sample)} tensors"
    return f"{{{names}}}" if isinstance(sample, Mapping) else f"({names})"


def split_teacher_inputs(x: Any) -> tuple[Any, Any]:
    """Return the inputs of a batch, and the inputs of teachers, which are the entry ``teacher_inputs``, else None.

    One tensor alone in the entries of an item is the inputs itself.
    """
    if not isinstance(x, Mapping):
        return x, None
    rest = {name: part for name, part in x.items() if name != TEACHER_INPUTS}
    if not rest:
        raise InputError(f"inputs must have an entry besides {TEACHER_INPUTS}, got none")
    alone = len(rest) == 1 and isinstance(x, Entries)
    return next(iter(rest.values())) if alone else rest, x.get(TEACHER_INPUTS)


def shapes_of(x: Any) -> Any:
    """Return the shape of a tensor, or of each tensor of inputs by name, for a comparison."""
    if isinstance(x, Tensor):
        return x.shape
    if isinstance(x, Mapping):
        return {name: shapes_of(part) for name, part in x.items()}
    return tuple(map(shapes_of, x))
