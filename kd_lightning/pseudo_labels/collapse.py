"""Pseudo-labels that are nearly all of one class, although the labels are not."""

from __future__ import annotations

from torch import Tensor

ALMOST_ALL = 0.9
"""Share of the accepted pseudo-labels that a class has which absorbs the others."""
ROWS_OF_A_CLASS = 10
"""Unlabeled rows for each class, from which on shares are looked at."""


def collapse_text(accepted: Tensor, given: Tensor, unlabeled: float) -> str | None:
    """Return the text of a warning if one class absorbs the others, else None.

    That is: most unlabeled samples have an accepted pseudo-label, nearly all of these are of one class, and no more
    than half of the given labels are. Few accepted ones of one class are no sign of it: easy classes come first.

    Args:
        accepted: Accepted pseudo-labels of each class, (C,).
        given: Given labels of each class, (C,).
        unlabeled: Number of unlabeled samples.
    """
    total, labels = float(accepted.sum()), float(given.sum())
    if unlabeled < ROWS_OF_A_CLASS * len(accepted) or total <= unlabeled / 2 or not labels:
        return None
    number = int(accepted.argmax())
    share, of_given = float(accepted[number]) / total, float(given[number]) / labels
    if share < ALMOST_ALL or of_given > 0.5:
        return None
    return (
        f"{share:.0%} of the accepted pseudo-labels are of class {number}, which has {of_given:.0%} of the labels; "
        "unless the unlabeled samples are so, this class has absorbed the others: normalise the inputs, train longer "
        "on the labels first, or give more labels"
    )
