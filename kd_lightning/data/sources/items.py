"""The inputs and the label of an item, whatever kind of item a dataset returns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from kd_lightning.batch import DENSE_LABEL_KEY
from kd_lightning.batch import LABEL_KEYS as BATCH_LABEL_KEYS
from kd_lightning.errors import InputError

IMAGE_KEYS = ("image", "img", "x", "pixel_values", "input", "inputs")
LABEL_KEYS = (*BATCH_LABEL_KEYS, "fine_label")
TEACHER_INPUTS = "teacher_inputs"
"""The entry of a mapping that teachers get in place of the inputs."""
STRONG_INPUTS = "x_strong"
"""The entry of a mapping that is the sample's own strong view, such as a paraphrase of a text."""


class Entries(dict[str, Any]):
    """The entries of an item that is a mapping, without its label. A tensor among no others is the inputs."""


def image_of(item: Any, place: str) -> Any:
    """Return the inputs of an item: its image, or several inputs as a mapping or tuple.

    Args:
        item: One of these:

            - ``(image, label, ...)``, where the image may be a mapping or tuple of inputs;
            - a mapping or named tuple with one of the ``IMAGE_KEYS``, unless it is a tensor among others;
            - any other mapping: all of its entries but the label, as ``Entries``; one tensor or picture as it is;
            - the inputs alone.
        place: Name of the item, for messages.

    Raises:
        InputError: If the item has no inputs, or if a mapping has two images that are no tensors.
    """
    if isinstance(item, tuple | list):
        if (named := _by_name(item)) is not None:
            return _entries(named, place)
        if not item:
            raise InputError(f"{place} must be {_ALLOWED}, got an empty {type(item).__name__}")
        return item[0]
    return _entries(item, place) if isinstance(item, Mapping) else item


def label_of(item: Any, place: str, *, dense: bool = False) -> Any:
    """Return the label of an item, as it is; None for a sample without a label.

    Args:
        item: ``(image, label, ...)``, or a mapping or named tuple with one of the ``LABEL_KEYS``, else ``mask``.
        place: Name of the item, for messages.
        dense: Whether labels are dense, and may look like inputs. Default: False, which means that such a pair is an
            error.

    Raises:
        InputError: If the item has no place for a label, if a mapping has several of the keys, or if a tuple may hold
            several inputs in place of ``(image, label, ...)``.
    """
    if isinstance(item, tuple | list) and len(item) >= 2:
        named = _by_name(item)
        if named is not None:
            return _label(named, place)
        if not dense:
            check_pair(item[0], item[1], len(item), place)
        return item[1]
    if isinstance(item, Mapping):
        return _label(item, place)
    size = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
    raise InputError(f"{place} must be {_ALLOWED}, got {type(item).__name__}{size}")


def check_pair(first: Any, second: Any, count: int, place: str) -> None:
    """Raise InputError if the first two parts of an item may be two inputs, as ``Batch.from_any`` does for a batch.

    Args:
        first: The first part.
        second: The second part.
        count: Number of parts.
        place: Name of the item, for the message.
    """
    if not isinstance(first, Tensor | np.ndarray) or not isinstance(second, Tensor | np.ndarray):
        return
    one, other = ((part.dtype, tuple(part.shape)) for part in (first, second))
    alike = one[0] == other[0] and len(one[1]) == len(other[1]) > 1 and one[1][0] == other[1][0]
    integers = not any(kind in str(one[0]) + str(other[0]) for kind in ("float", "complex"))
    if alike or (count > 2 and integers and one[1] == other[1] and one[1]):
        raise InputError(
            f"{place} begins with {[*one[1]]} and {[*other[1]]} of one kind, which may be two inputs, or inputs and "
            "labels; return ((a, b), label), or a mapping such as {input_ids, attention_mask, labels}"
        )


def split_strong(inputs: Any, place: str = "a sample") -> tuple[Any, Any]:
    """Return the inputs of a sample, and its own strong view, which is the entry ``x_strong``, else None.

    One tensor, array or picture that is left in the entries of an item is the inputs itself.

    Args:
        inputs: What :func:`image_of` returns.
        place: Name of the sample, for messages.

    Raises:
        InputError: If there is no other entry.
    """
    if not isinstance(inputs, Mapping) or STRONG_INPUTS not in inputs:
        return inputs, None
    form, strong = Entries if isinstance(inputs, Entries) else dict, inputs[STRONG_INPUTS]
    rest = form({name: part for name, part in inputs.items() if name != STRONG_INPUTS})
    if not rest:
        raise InputError(f"{place} must have an entry besides {STRONG_INPUTS}, got none")
    one = next(iter(rest.values()))
    is_alone = form is Entries and len(rest) == 1 and isinstance(one, Tensor | np.ndarray | Image.Image)
    if isinstance(strong, Mapping):
        strong = strong.get(next(iter(rest)), strong) if is_alone and len(strong) == 1 else form(strong)
    return one if is_alone else rest, strong


def content_of(inputs: Any) -> Any:
    """Return what of a sample's inputs is its content: of a mapping all entries but paths and positions, by name.

    A strong view is none: it belongs to the training, and the copy of a sample in the test part has none.
    """
    inputs, _ = split_strong(inputs)
    if isinstance(inputs, Mapping):
        named = sorted(inputs.items(), key=lambda item: str(item[0]))
        return {name: content_of(value) for name, value in named if not _is_name(str(name), value)}
    return tuple(map(content_of, inputs)) if type(inputs) is tuple else inputs


def _is_name(name: str, value: Any) -> bool:
    """Whether an entry names the place of a sample: a path, or its number in the dataset."""
    if isinstance(value, str):
        return "path" in name or "file" in name or os.path.isabs(value)  # noqa: PTH117  (it may be any text)
    is_number = isinstance(value, int) or getattr(value, "ndim", None) == 0
    return isinstance(value, PurePath) or (is_number and name in ("index", "idx"))


def picture_of(inputs: Any) -> Any:
    """Return the image among the inputs of a sample, if it is under one of the ``IMAGE_KEYS``; else the inputs."""
    found = [inputs[name] for name in IMAGE_KEYS if name in inputs] if isinstance(inputs, Mapping) else []
    return found[0] if len(found) == 1 else inputs


def left_out(item: Any) -> list[str]:
    """Return the names of an item's entries with numbers that are no inputs, where a mapping's image stands alone."""
    inputs = image_of(item, "the item") if isinstance(item, Mapping) else None
    if inputs is None or isinstance(inputs, Entries):
        return []
    labels = {*LABEL_KEYS}.intersection(item) or {DENSE_LABEL_KEY}
    named = ((name, value) for name, value in item.items() if name not in labels and value is not inputs)
    return [str(name) for name, value in named if _has_numbers(value) or isinstance(value, list)]


_ALLOWED = (
    f"(image, label), or a mapping with an image ({', '.join(IMAGE_KEYS)}) or tensors by name, and a label "
    f"({', '.join((*LABEL_KEYS, DENSE_LABEL_KEY))}), which is None for a sample without one"
)


def _by_name(item: Sequence[Any]) -> Mapping[str, Any] | None:
    """The fields of a named tuple with a label that is not the second field, or with an image; None for any other."""
    fields = getattr(item, "_fields", None)
    if fields is None or not {*LABEL_KEYS}.intersection(fields):
        return None
    if fields[1:2] and fields[1] in LABEL_KEYS and not {*IMAGE_KEYS}.intersection(fields):
        return None
    return dict(zip(fields, item, strict=True))


def _label(item: Mapping[str, Any], place: str) -> Any:
    found = [key for key in LABEL_KEYS if key in item] or [key for key in (DENSE_LABEL_KEY,) if key in item]
    if len(found) != 1:
        raise _wrong_keys(item, found, place)
    return item[found[0]]


def _entries(item: Mapping[str, Any], place: str) -> Any:
    labels = {*LABEL_KEYS}.intersection(item) or {DENSE_LABEL_KEY}
    entries = Entries({name: value for name, value in item.items() if name not in labels})
    images = [name for name in IMAGE_KEYS if name in entries]
    arrays = [name for name, value in entries.items() if _has_numbers(value)]
    if len(images) == 1 and not {TEACHER_INPUTS, STRONG_INPUTS} & {*entries}:
        image = entries[images[0]]
        if arrays == images or not isinstance(image, Tensor):
            return image
    if len(images) > 1 and not {*images} <= {*arrays}:
        raise _wrong_keys(item, images, place)
    if len(entries) == 1 and isinstance(value := next(iter(entries.values())), Tensor | np.ndarray | Image.Image):
        return value
    if not any(isinstance(value, _INPUTS) for value in entries.values()):
        raise _wrong_keys(item, [], place)
    return entries


_INPUTS = (Tensor, np.ndarray, Mapping, list, tuple, str, bytes, Image.Image)
"""What inputs may be, or what a transform may turn into inputs."""


def _has_numbers(value: Any) -> bool:
    """Whether an entry is a tensor or array with dimensions, or holds one."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return any(map(_has_numbers, parts))


def _wrong_keys(item: Mapping[str, Any], found: Sequence[str], place: str) -> InputError:
    several = f"{' and '.join(found)}, which could each be it; " if found else ""
    return InputError(f"{place} must be {_ALLOWED}; got {several}the keys {', '.join(map(str, item)) or 'none'}")
