"""Set up a selection for the data of a fit."""

from __future__ import annotations

from typing import Any

from kd_lightning.batch import is_labeled
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection


def set_up(selection: Selection, data: Any, num_classes: int | None, *, dense: bool = False) -> None:
    """Call a selection's ``setup`` with the numbers of a datamodule.

    Args:
        selection: The selection.
        data: The datamodule, or None.
        num_classes: Number of predictions of a sample. None means that of the class names, or else of the labels.
        dense: Whether samples have more than one label each. These labels are not in memory.

    Raises:
        InputError: If the selection needs what the data do not have.
    """
    names = getattr(data, "class_names", None)
    num_samples = num_unlabeled = None
    num_classes = num_classes or (None if names is None else len(names))
    if not dense and all(callable(getattr(data, name, None)) for name in ("unlabeled_indices", "visible_labels")):
        labels = data.visible_labels()
        num_samples, num_unlabeled = len(labels), len(data.unlabeled_indices())
        known = is_labeled(labels)
        if selection.needs_labeled and not known.any():
            raise InputError(f"{type(selection).__name__} needs labeled samples, but there are none")
        if num_classes is None and labels.ndim > 1:
            num_classes = labels.shape[1]
        elif num_classes is None and known.any() and "regression" not in selection.tasks:
            num_classes = int(labels[known].max()) + 1
    selection.setup(num_samples, num_classes, num_unlabeled)
