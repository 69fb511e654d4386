"""Metrics whose state does not grow with the square of the classes, or with the number of labels seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassF1Score

from kd_lightning.batch import IGNORE_INDEX

_BINS = 15
_SCALE = 2**24  # probabilities are summed in these units, as integers: exact in any order


class MacroF1(MulticlassF1Score):
    """torchmetrics' macro F1 of the multiclass task, from counts of each class.

    torchmetrics counts the same by way of a matrix (C, C) for each batch. The value is equal to the bit. Classes that
    neither occur nor are predicted are left out of the mean.

    Args:
        classes: Number of classes C.
    """

    tp: Tensor
    fp: Tensor
    tn: Tensor
    fn: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average="macro")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add probabilities (B, C) and class indices (B,), -100 where the label is missing."""
        known = target != IGNORE_INDEX
        target, predicted = target[known], preds.argmax(dim=1)[known]
        true, occurs, given = (
            torch.bincount(labels, minlength=preds.shape[1])
            for labels in (target[target == predicted], target, predicted)
        )
        self.tp = self.tp + true
        self.fp = self.fp + (given - true)
        self.fn = self.fn + (occurs - true)
        self.tn = self.tn + (len(target) - given - occurs + true)


class BinaryCalibrationSums(Metric):
    """The expected calibration error of single probabilities over 15 bins of equal width, from sums of each bin.

    It is torchmetrics' ``BinaryCalibrationError``, which stores all probabilities, and whose counts of float32 end at
    16.8 million a bin.
    """

    counts: Tensor
    positives: Tensor
    confidences: Tensor
    not_finite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in (
            "counts",
            "positives",
            "confidences",
        ):  # a probability of 1 has a bin of its own, as in torchmetrics
            self.add_state(name, torch.zeros(_BINS + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("not_finite", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add probabilities (N,) in float32 and zeros and ones (N,), -100 where the label is missing."""
        known = target != IGNORE_INDEX
        probabilities, target = probabilities[known], target[known]
        finite = probabilities.isfinite()
        self.not_finite = self.not_finite + (~finite).sum()
        probabilities, target = probabilities[finite], target[finite]
        edges = torch.linspace(0, 1, _BINS + 1, device=probabilities.device)
        bins = torch.bucketize(probabilities, edges, right=True) - 1
        self.counts = self.counts + torch.bincount(bins, minlength=_BINS + 1)
        self.positives = self.positives + torch.bincount(bins[target == 1], minlength=_BINS + 1)
        units = (probabilities * _SCALE).round().long()
        self.confidences = self.confidences + torch.zeros_like(self.confidences).scatter_add_(0, bins, units)

    def compute(self) -> Tensor:
        """Return the sum over bins of |share of ones - mean probability|, weighted by the bin's share of all labels."""
        counts, positives, confidences = (
            part.cpu().double() for part in (self.counts, self.positives, self.confidences)
        )
        error = (positives - confidences / _SCALE).abs().sum() / counts.sum()
        return torch.where(self.not_finite.cpu() > 0, torch.nan, error).float().to(self.counts.device)
