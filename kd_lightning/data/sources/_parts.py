"""The labels of map-style datasets, for the sources of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.class_names import class_names_of, normal_name, number_names, renumber_classes
from kd_lightning.data.sources.images import read_item
from kd_lightning.data.sources.items import label_of
from kd_lightning.data.sources.source import Part, Parts
from kd_lightning.data.sources.targets import Labels, is_missing, normalize, texts_among, to_tensor
from kd_lightning.errors import InputError

_ATTRIBUTES = ("targets", "labels", "_labels")
_CHECKED = 8
"""Number of items whose labels are compared with those of an attribute."""
_MANY = 20_000
"""Number of items from which on the reading is announced."""


def dataset_part(dataset: Any) -> Part:
    """A map-style dataset of labeled items as a part of a source. Labels that are texts are its ``classes``."""
    return Part(dataset, _to_targets(dataset, _read_labels(dataset), class_names_of(dataset))[0])


def dataset_parts(
    train: Any, test: Any, unlabeled: Any, class_names: Sequence[str] | None = None, *, val: Any = None
) -> Parts:
    """Map-style datasets as the parts of a source.

    Classes of the test and validation parts are found by their names, if these have any.

    Args:
        train: The training part.
        test: The test part; None for none.
        unlabeled: Images without labels; None for none.
        class_names: Names of the classes. Default: None, which means the ``classes`` of ``train``, if any, or the
            labels themselves, sorted, where they are texts.
        val: The source's own validation part. Default: None, which means none.

    Raises:
        InputError: If labels cannot be read, or if the test or validation part has a class that the training part
            lacks.
    """
    listed = class_names_of(train)
    class_names = None if class_names is None else [*map(str, class_names)]
    if class_names and listed and {*class_names} == {*listed} and [*class_names] != listed:
        raise InputError(f"class_names must have the order of the dataset's classes, {listed}, got {[*class_names]}")
    labels = _read_labels(train)
    targets, names = _to_targets(train, labels, class_names or listed)

    def like_training(name: str, dataset: Any) -> Part:
        found = _read_labels(dataset)
        texts = texts_among(found)
        if texts != texts_among(labels) and (names is None or not texts):
            kind, other = ("texts", "numbers") if texts_among(labels) else ("numbers", "texts")
            raise InputError(
                f"{name}: its labels must be {kind}, as those of train, or class_names be given; got {other}"
            )
        numbers, _ = _to_targets(dataset, found, names)
        theirs = class_names_of(dataset)
        if listed and theirs and not texts:
            numbers = renumber_classes(numbers, theirs, listed)
        return Part(dataset, numbers)

    test, val = (None if one is None else like_training(name, one) for name, one in (("test", test), ("val", val)))
    return Parts(Part(train, targets), test, unlabeled, names, val=val)


def unlabeled_parts(images: Any, test: Part | None, val: Part | None, class_names: Sequence[str] | None) -> Parts:
    """Images without labels as the training part of a source. Its test and validation parts may have labels.

    Args:
        images: The images.
        test: The test part; None for none.
        val: The source's own validation part; None for none.
        class_names: Names of the classes; None if they are unknown.
    """
    like = next((part.targets for part in (val, test) if part is not None), torch.zeros(0, dtype=torch.long))
    missing = float("nan") if like.is_floating_point() or like.ndim > 1 else IGNORE_INDEX
    targets = torch.full((len(images), *like.shape[1:]), missing)
    return Parts(Part(images, targets), test, None, None if class_names is None else [*class_names], val=val)


def parts_without_labels(images: Any, test: Any, class_names: Sequence[str] | None = None, *, val: Any = None) -> Parts:
    """The same of map-style datasets whose training part has no labels; for the rest see :func:`dataset_parts`."""
    if val is None and test is None:
        return unlabeled_parts(images, None, None, class_names)
    if val is None:
        found = dataset_parts(test, None, None, class_names)
        return unlabeled_parts(images, found.train, None, found.class_names)
    found = dataset_parts(val, test, None, class_names)
    return unlabeled_parts(images, found.test, found.train, found.class_names)


def check_map_style(name: str, dataset: Any) -> None:
    """Raise InputError for a dataset without length or index; ``name`` is that of the argument."""
    whole = hasattr(type(dataset), "__len__") and hasattr(type(dataset), "__getitem__")
    if not whole or isinstance(dataset, IterableDataset):
        hint = "; StreamDataModule reads it in order" if hasattr(dataset, "__iter__") else ""
        raise InputError(
            f"{name} must be a map-style dataset, with length and index, got {type(dataset).__name__}{hint}"
        )


def _to_targets(dataset: Any, labels: Labels, names: Sequence[str] | None) -> tuple[Tensor, list[str] | None]:
    """Return labels as a tensor, and the names of the classes: those given, or those that the labels are."""
    place = type(dataset).__name__
    if texts_among(labels):
        labels, names = number_names(labels if isinstance(labels, list) else labels.tolist(), names, place)
    return normalize(to_tensor(labels, place), place), None if names is None else [*names]


# Labels as a dataset holds them.


def _read_labels(dataset: Any) -> Labels:
    """Return the label of each item. All items are read only if no attribute has the labels.

    Raises:
        InputError: If an attribute has other labels than the items.
    """
    if _is_plain(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            raise InputError("a labeled part must be a dataset of (image, label), got a TensorDataset of one tensor")
        if len(dataset):
            label_of(dataset[0], f"item 0 of {type(dataset).__name__}")  # refuses two inputs in place of a label
        labels: Tensor = dataset.tensors[1]
        return labels
    if _is_plain(dataset, ConcatDataset) and not any(hasattr(dataset, name) for name in _ATTRIBUTES):
        return _join([_read_labels(part) for part in dataset.datasets])
    if (found := _find_labels(dataset)) is not None:
        return found
    size, name = len(dataset), type(dataset).__name__
    if size >= _MANY:
        rank_zero_info(f"data: reading {size} items of {name} for their labels")
    return [label_of(read_item(dataset, index), f"item {index} of {name}") for index in range(size)]


def _find_labels(dataset: Any) -> Labels | None:
    """Return the labels that an attribute has, if those of some items are equal; None if no attribute has labels.

    An attribute of another kind, such as names where items have numbers, does not count.
    """
    candidates = [*_listed(dataset)]
    if not candidates or not len(dataset):
        return None
    size = len(dataset)
    places = sorted({int(place) for place in np.linspace(0, size - 1, min(size, _CHECKED))})
    with isolate_rng(include_cuda=False):
        items = {place: label for place in places if (label := _label_at(dataset, place)) is not _UNREADABLE}
    problem = ""
    for name, found in candidates:
        pairs = ((place, _plain(found[place]), _plain(label)) for place, label in items.items())
        different = next((pair for pair in pairs if not _same(*pair[1:])), None)
        if different is None:
            return found
        place, here, there = different
        if _kind(here) == _kind(there) or here is None or there is None:
            problem = problem or f"item {place} has the label {_text(there)}, but {name}[{place}] is {_text(here)}"
    if problem:
        raise InputError(f"{type(dataset).__name__}: {problem}; they must be equal, or the attribute be renamed")
    return None


def _listed(dataset: Any) -> Iterator[tuple[str, Labels]]:
    """Yield names and values of attributes that may have the label of each item, without reading an item."""
    size = len(dataset)
    for name in _ATTRIBUTES:
        found = _sequence(getattr(dataset, name, None))
        if found is None or len(found) != size:
            continue
        transform = getattr(dataset, "target_transform", None)
        if callable(transform) and (changed := _transform(found, transform)) is not None:
            yield f"target_transform of {name}", changed
        yield name, found
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        yield "tensors[1]", dataset.tensors[1]
    if isinstance(dataset, Subset):
        indices = [int(index) for index in dataset.indices]
        for name, found in _listed(dataset.dataset):
            yield name, found[indices] if isinstance(found, Tensor | np.ndarray) else [found[n] for n in indices]
    if isinstance(dataset, ConcatDataset):
        parts = [next(_listed(part), None) for part in dataset.datasets]
        if all(part is not None for part in parts):
            yield "labels of the parts", _join([part[1] for part in parts if part is not None])


def _is_plain(dataset: Any, kind: Any) -> bool:
    """Whether a dataset returns the items that this class returns."""
    return isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__


def _sequence(found: Any) -> Labels | None:
    """Return a sequence of labels as tensor, array or list; None for anything else."""
    if isinstance(found, Tensor | np.ndarray):
        return found if found.ndim else None
    if isinstance(found, list | tuple):
        return [*found]
    if isinstance(found, Mapping) or not callable(tolist := getattr(found, "tolist", None)):  # a Series has it
        return None
    values = tolist()
    return values if isinstance(values, list) else None


def _transform(labels: Labels, transform: Callable[[Any], Any]) -> list[Any] | None:
    try:
        return [transform(label) for label in (labels if isinstance(labels, list) else labels.tolist())]
    except Exception:  # it is made for what the dataset's items have in place of these labels
        return None


def _join(parts: Sequence[Labels]) -> Labels:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts) and len({(part.dtype, part.shape[1:]) for part in tensors}) == 1:
        return torch.cat(tensors)
    return [label for part in parts for label in (part if isinstance(part, list) else part.tolist())]


# The comparison of an attribute with the items.

_UNREADABLE = object()


def _label_at(dataset: Any, index: int) -> Any:
    try:
        return label_of(read_item(dataset, index), "")
    except InputError:  # a broken file, which is named when it is needed; or the items have no labels
        return _UNREADABLE


def _plain(label: Any) -> Any:
    """A label as an int, float, text, or list of these; None if it is missing; anything else as it is."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.tolist()
    if isinstance(label, list | tuple):
        values = [_plain(value) for value in label]
        return values[0] if len(values) == 1 else values
    if isinstance(label, str):
        return normal_name(label) or None
    if is_missing(label):
        return None
    if not isinstance(label, Real):
        return label
    return None if label in (-1, IGNORE_INDEX) else float(label)


def _same(a: Any, b: Any) -> bool:
    """Whether two plain labels are equal; numbers may differ by the rounding of float32."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= 1e-6 * abs(a)
    return _kind(a) == _kind(b) and _kind(a) in ("text", "nothing", "bytes") and a == b


def _text(label: Any) -> str:
    return f"{label:g}" if isinstance(label, float) else f"{label!r:.60}"


def _kind(label: Any) -> str:
    if label is None:
        return "nothing"
    kinds = {float: "number", str: "text", list: "row"}
    return next((name for kind, name in kinds.items() if isinstance(label, kind)), type(label).__name__)
