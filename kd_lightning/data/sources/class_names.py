"""Names of classes: of a dataset, as labels, and to find the classes of one dataset in another."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.targets import has_one_class, is_missing
from kd_lightning.errors import InputError

_MOST = 20  # names in a message


def normal_name(name: str) -> str:
    """Return a name in Unicode NFC, without space around it."""
    return unicodedata.normalize("NFC", name).strip()


def class_names_of(dataset: Any) -> list[str] | None:
    """The ``classes`` of a dataset, or of the datasets that it selects from, if they have them.

    Raises:
        InputError: If the parts of a ConcatDataset have different classes.
    """
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple):
        return [str(name) for name in names]
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        found = [names for part in dataset.datasets if (names := class_names_of(part)) is not None]
        for other in found[1:]:
            if other != found[0]:
                raise InputError(f"the parts of a ConcatDataset must have the same classes, got {found[0]} and {other}")
        return found[0] if len(found) == len(dataset.datasets) else None
    return None


def number_names(labels: Sequence[Any], names: Sequence[str] | None, place: str) -> tuple[list[int], list[str]]:
    """Return class numbers of labels that are names, -100 where a label is missing, and the names by number.

    Args:
        labels: Texts; None, NaN or an empty text where a label is missing.
        names: Names of the classes. Default: None, which means those among the labels, sorted.
        place: Name of the dataset, for messages.

    Raises:
        InputError: For a label that is no text, or that is none of the names. The message names the item.
    """
    texts: list[str] = []
    for number, label in enumerate(labels):
        if not isinstance(label, str) and not is_missing(label):
            raise InputError(
                f"{place}: labels must all be texts or all be numbers, but item {number} has {label!r:.60}"
            )
        texts.append(normal_name(label) if isinstance(label, str) else "")
    names = [*names] if names else sorted({*texts} - {""})
    normal = [normal_name(name) for name in names]
    place_of = {name: number for number, name in enumerate(normal)} | {"": IGNORE_INDEX}
    twice = {name for name, count in Counter(normal).items() if count > 1}
    for number, text in enumerate(texts):
        if text not in place_of or text in twice:
            which = "a name of two" if text in twice else "none"
            raise InputError(f"{place}: item {number} has the class {text!r:.60}, {which} of {_shorten(names)}")
    return [place_of[text] for text in texts], names


def renumber_classes(targets: Tensor, theirs: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return the labels of a test part, with the numbers that the training part has for classes of the same names.

    Args:
        targets: Labels of the test part.
        theirs: Names of its classes, by number.
        names: Those of the training part.

    Raises:
        InputError: If a test sample has a class that the training part lacks, and if classes cannot be told apart by
            name or samples have several labels each, whose order is another.
    """
    before, after = ([normal_name(name) for name in part] for part in (theirs, names))
    if before == after:
        return targets
    if not has_one_class(targets) or len({*before}) < len(before) or len({*after}) < len(after):
        raise InputError(
            f"test: its classes must be those of the training part, {_shorten(names)}, got {_shorten(theirs)}"
        )
    numbers = {number: after.index(name) for number, name in enumerate(before) if name in after}
    present = torch.unique(targets[targets >= 0]).tolist()
    for number in present:
        if number not in numbers:
            name = theirs[number] if number < len(theirs) else number
            raise InputError(f"test: its class {name!r} is none of the training part's classes, {_shorten(names)}")
    table = torch.full((max(present, default=0) + 1,), IGNORE_INDEX)
    table[present] = torch.tensor([numbers[number] for number in present], dtype=torch.long)
    return torch.where(targets >= 0, table[targets.clamp_min(0)], targets)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST]) + (", ..." if len(names) > _MOST else "")
