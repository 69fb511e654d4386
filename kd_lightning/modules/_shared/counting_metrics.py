"""Metrics as sums over batches and processes: their memory grows neither with C², nor with the number of samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.ranks import is_distributed

_BINS = 15
_SCALE = 2**24  # probabilities are summed in these units, as integers: exact in any order
_MOST = 2**20  # probabilities at a time: 100,000 labels of 64 rows would take a quarter of a gigabyte
CALIBRATION_SHAPE = (3, _BINS + 2)
"""Shape of :func:`calibration_counts`."""


class Sums(nn.Module):
    """Named sums of numbers, which add up over batches and over processes. They start at 0.

    They are buffers, which :meth:`of_all_processes` sums in one message for each type of number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

    def start(self, name: str, *shape: int, dtype: torch.dtype = torch.long) -> None:
        """Begin a sum."""
        self._names.append(name)
        self.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=False)

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum."""
        sums = self._buffers[name]
        assert sums is not None
        sums += value

    def of_all_processes(self) -> dict[str, Tensor]:
        """Return the sums over all processes, which must all call this, by name."""
        sums = {name: self.get_buffer(name) for name in self._names}
        if not is_distributed():
            return sums
        found: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(value.dtype for value in sums.values()):
            parts = {name: value for name, value in sums.items() if value.dtype == dtype}
            flat = torch.cat([value.flatten() for value in parts.values()])
            torch.distributed.all_reduce(flat)
            split = torch.split(flat, [value.numel() for value in parts.values()])
            found |= {name: part.view_as(parts[name]) for name, part in zip(parts, split, strict=True)}
        return found


def class_counts(target: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count for each class how often it is right, how often it occurs, and how often it is predicted: (3, C).

    Args:
        target: (B,) class indices.
        predicted: (B,) class indices.
        classes: C. A larger index is an error.
    """
    right = target[target == predicted]
    return torch.stack([torch.bincount(labels, minlength=classes) for labels in (right, target, predicted)])


def label_counts(target: Tensor, predicted: Tensor, known: Tensor) -> Tensor:
    """Count the same for each of many labels, which may occur together: (3, L).

    Args:
        target: (B, L) booleans.
        predicted: (B, L) booleans.
        known: (B, L) booleans: which labels count.
    """
    occurs, given = known & target, known & predicted
    return torch.stack([(occurs & given).sum(dim=0), occurs.sum(dim=0), given.sum(dim=0)])


def macro_f1(counts: Tensor, of_absent: bool = False) -> Tensor:
    """Return the mean F1 of the classes, as torchmetrics computes it, to the bit.

    Args:
        counts: From :func:`class_counts` or :func:`label_counts`.
        of_absent: Whether classes that neither occur nor are predicted count, with an F1 of 0. If not, they are left
            out of the mean. torchmetrics counts them for the multilabel task alone.
    """
    right, occurs, given = counts
    total = 2.0 * right + 1.0 * (occurs - right) + (given - right)
    scores = 2.0 * right / torch.where(total == 0, 1, total)
    counted = torch.ones_like(total) if of_absent else (total > 0).float()
    mean: Tensor = (counted * scores / counted.sum().clamp(min=1)).sum()
    return mean


def recalls(counts: Tensor) -> Tensor:
    """Return the recall of each class, (C,): the share of its samples that are predicted as it. NaN without samples.

    Args:
        counts: From :func:`class_counts` or :func:`label_counts`.
    """
    right, occurs, _ = counts
    return torch.where(occurs > 0, right / occurs.clamp(min=1), torch.nan)


def zero_and_one(counts: Tensor, labels: Tensor) -> Tensor:
    """Return the counts (3, 2) of the two classes of one label, zero and one.

    Args:
        counts: From :func:`label_counts` of one label, (3, 1).
        labels: Number of labels.
    """
    right, occurs, given = counts
    zero = torch.stack([labels - occurs - given + right, labels - occurs, labels - given])
    return torch.cat([zero, counts], dim=1)


def mean_iou(counts: Tensor) -> Tensor:
    """Return the mean intersection over union of the classes that occur or are predicted.

    This is torchmetrics' JaccardIndex, with ``average="macro"`` for several classes.

    Args:
        counts: From :func:`class_counts` or :func:`label_counts`.
    """
    right, occurs, given = counts
    union = occurs + given - right
    mean: Tensor = (right / union.clamp(min=1))[union > 0].mean()
    return mean


def calibration_counts(confidence: Tensor, right: Tensor) -> Tensor:
    """Count wrong and right decisions, and sum their confidence, in 15 bins of equal width: (3, 17).

    A confidence of 1 has a bin of its own, as in torchmetrics. The last bin counts numbers that are not finite.

    Args:
        confidence: Probabilities in float32, of any shape.
        right: Booleans of the same shape.
    """
    counts = torch.zeros(CALIBRATION_SHAPE, dtype=torch.long, device=confidence.device)
    parts = (torch.split(values.flatten(), _MOST) for values in (confidence, right))
    for some, of_some in zip(*parts, strict=True):
        counts += _calibration_counts(some, of_some)
    return counts


def _calibration_counts(confidence: Tensor, right: Tensor) -> Tensor:
    edges = torch.linspace(0, 1, _BINS + 1, device=confidence.device)
    unknown = ~confidence.isfinite()
    bins = (torch.bucketize(confidence, edges, right=True) - 1).masked_fill(unknown, _BINS + 1)
    numbers = torch.bincount(bins + (_BINS + 2) * right, minlength=2 * (_BINS + 2)).view(2, -1)
    units = (confidence * _SCALE).round().masked_fill(unknown, 0).long()
    return torch.cat([numbers, torch.zeros_like(numbers[:1]).scatter_add_(1, bins[None], units[None])])


def calibration_error(counts: Tensor) -> Tensor:
    """Return the expected calibration error from :func:`calibration_counts`.

    It is the sum over bins of |share of right decisions - mean confidence|, weighted by the bin's share of all
    decisions. torchmetrics' metrics give the same, but store every confidence. NaN if a confidence was not finite.
    """
    wrong, right, confidence = counts.cpu().double()
    error = (right - confidence / _SCALE).abs().sum() / (wrong + right).sum()
    return torch.where(wrong[-1] + right[-1] > 0, torch.nan, error).float().to(counts.device)
