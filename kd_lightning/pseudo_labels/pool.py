"""The samples of a datamodule that pseudo-labels are for."""

from __future__ import annotations

from typing import Any

from kd_lightning.batch import is_labeled


def unlabeled_samples(data: Any, *, dense: bool = False) -> list[int] | None:
    """Return the samples with a label that is missing, ascending; None if the datamodule does not know them.

    They are the unlabeled ones, and those of which some labels are known and others are not.

    Args:
        data: The datamodule, or None.
        dense: Whether labels are dense. Then only samples without any label count: these labels are not in memory.
    """
    if not callable(getattr(data, "unlabeled_indices", None)):
        return None
    found = {*data.unlabeled_indices()}
    knows_labels = not dense and callable(getattr(data, "visible_labels", None))
    labels = data.visible_labels() if knows_labels else None
    if labels is not None and labels.ndim > 1:
        known = is_labeled(labels)
        found.update((known.any(dim=1) & ~known.all(dim=1)).nonzero().flatten().tolist())
    return sorted(found)
