"""The image and the label of an item, whatever kind of item a dataset returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.errors import InputError

IMAGE_KEYS = ("image", "img", "x", "pixel_values", "input", "inputs")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "fine_label")


def image_of(item: Any, place: str) -> Any:
    """Return the image of an item.

    Args:
        item: ``(image, label, ...)``, a mapping or named tuple with one of the ``IMAGE_KEYS``, or the image alone.
        place: Name of the item, for messages.

    Raises:
        InputError: If the item has no image, or if a mapping has several of the keys.
    """
    if isinstance(item, tuple | list):
        if (named := _by_name(item)) is not None:
            return _value(named, IMAGE_KEYS, place)
        if not item:
            raise InputError(f"{place} must be {_ALLOWED}, got an empty {type(item).__name__}")
        return item[0]
    return _value(item, IMAGE_KEYS, place) if isinstance(item, Mapping) else item


def label_of(item: Any, place: str) -> Any:
    """Return the label of an item, as it is; None for a sample without a label.

    Args:
        item: ``(image, label, ...)``, or a mapping or named tuple with one of the ``LABEL_KEYS``.
        place: Name of the item, for messages.

    Raises:
        InputError: If the item has no place for a label, or if a mapping has several of the keys.
    """
    if isinstance(item, tuple | list) and len(item) >= 2:
        named = _by_name(item)
        return item[1] if named is None else _value(named, LABEL_KEYS, place)
    if isinstance(item, Mapping):
        return _value(item, LABEL_KEYS, place)
    size = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
    raise InputError(f"{place} must be {_ALLOWED}, got {type(item).__name__}{size}")


_ALLOWED = (
    f"(image, label), or a mapping with an image ({', '.join(IMAGE_KEYS)}) and a label ({', '.join(LABEL_KEYS)}), "
    "which is None for a sample without one"
)


def _by_name(item: Sequence[Any]) -> Mapping[str, Any] | None:
    """The fields of a named tuple that names both image and label; None for any other tuple or list."""
    fields = getattr(item, "_fields", None)
    if fields is None or not {*IMAGE_KEYS}.intersection(fields) or not {*LABEL_KEYS}.intersection(fields):
        return None
    return dict(zip(fields, item, strict=True))


def _value(item: Mapping[str, Any], keys: Sequence[str], place: str) -> Any:
    found = [key for key in keys if key in item]
    if len(found) != 1:
        several = f"{' and '.join(found)}, which could each be it; " if found else ""
        raise InputError(f"{place} must be {_ALLOWED}; got {several}the keys {', '.join(map(str, item)) or 'none'}")
    return item[found[0]]
