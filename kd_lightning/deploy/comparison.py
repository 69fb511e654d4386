"""Compare the outputs of an exported file with those of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_lightning.batch import IGNORE_INDEX, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import Inputs, describe

TOLERANCE = 1e-4
"""Default tolerance for float students."""
QUANTIZED_TOLERANCE = 5e-2
"""Default tolerance for quantised students."""
Predict = Callable[[Tensor], Tensor]
"""From logits to predicted labels."""


class Comparison(NamedTuple):
    """The difference between two sets of logits.

    Attributes:
        images: Number of images.
        largest: Largest absolute difference of a logit.
        relative: ``largest`` divided by the largest magnitude of an expected logit.
        typical: Median over the images of an image's largest difference, divided by the same magnitude.
        predictions: Number of predictions: one for each image, position or label; 0 for the regression task.
        changed: Number of predictions that differ.
    """

    images: int
    largest: float
    relative: float
    typical: float
    predictions: int
    changed: int

    @property
    def is_finite(self) -> bool:
        """Whether all logits are finite."""
        return math.isfinite(self.largest)

    @property
    def agreement(self) -> float:
        """Share of equal predictions."""
        return 1 - self.changed / max(self.predictions, 1)

    def agrees(self, tolerance: float) -> bool:
        """Return whether the logits agree.

        ``relative`` must be at most the tolerance and ``typical`` at most a tenth of it. At most one prediction in a
        thousand, plus one, may change: within the tolerance, only near-ties change.

        Args:
            tolerance: Largest allowed ``relative``, at least 0. Use 1e-4 for float students: runtimes differ in the
                order of their sums only (4e-7 on the digits). Use 5e-2 for quantised students: a runtime may round an
                input between two levels the other way. That changes the logits of a few images (by up to 0.3 % with
                three convolutions, 0.8 % with 20 to 56 layers; PyTorch itself differs as much with another batch
                size), but not those of the typical image (1e-7). A scale that is wrong by 1 % changes all images, by
                0.6 % or more.
        """
        close = self.relative <= tolerance and self.typical <= tolerance / 10
        return close and self.changed <= 1 + self.predictions / 1000


class Accuracy(NamedTuple):
    """Right predictions.

    Attributes:
        correct: Number of right predictions.
        n: Number of known labels: of samples, positions, or labels of a sample.
    """

    correct: int
    n: int

    @property
    def value(self) -> float:
        """Share of right predictions."""
        return self.correct / max(self.n, 1)


@torch.no_grad()
def collect_logits(network: Callable[[Any], Any], batches: Sequence[Inputs]) -> Tensor:
    """Return a network's logits for all batches, (N, ...). Those of fewer tokens are padded with zeros.

    Raises:
        InputError: If the network fails on a batch.
    """
    logits = []
    for x in batches:
        try:
            logits.append(logits_of(network(x), "the student"))
        except InputError:
            raise
        except Exception as error:  # runtimes raise errors of their own types
            reason = " ".join(str(error).split())
            raise InputError(f"the student fails on a batch of shape {describe(x)}: {reason}") from error
    if len({(part.ndim, part.shape[1:]) for part in logits}) > 1 and len({part.ndim for part in logits}) == 1:
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in logits), strict=True)]
        logits = [_padded(part, largest) for part in logits]
    return torch.cat(logits)


def _padded(part: Tensor, sizes: Sequence[int], value: float = 0) -> Tensor:
    missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
    return F.pad(part, [width for count in reversed(missing) for width in (0, count)], value=value)


def compare_logits(expected: Tensor, found: Tensor, predict: Predict | None) -> Comparison:
    """Compare the logits of a file with those of PyTorch.

    Args:
        expected: PyTorch's logits, (N, ...).
        found: The file's logits, of the same shape.
        predict: Function from logits to predicted labels; None for the regression task, which has none.

    Raises:
        InputError: If the shapes differ.
    """
    if found.shape != expected.shape:
        raise InputError(f"the file returns logits of shape {[*found.shape]}, PyTorch {[*expected.shape]}")
    differences = (found - expected).abs().reshape(len(found), -1).amax(1)
    largest, typical = float(differences.max()), float(differences.median())
    top = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    if predict is None:
        return Comparison(len(found), largest, largest / top, typical / top, 0, 0)
    same = predict(expected) == predict(found)
    return Comparison(len(found), largest, largest / top, typical / top, same.numel(), int((~same).sum()))


def measure_accuracy(logits: Tensor, labels: Tensor | None, predict: Predict | None) -> Accuracy | None:
    """Count the right predictions of logits (N, ...).

    Args:
        logits: Logits of all samples.
        labels: Labels of the first samples, as predictions are shaped, or probabilities of classes in one more
            dimension. Unknown ones are -100 or NaN. None if there are none.
        predict: See :func:`compare_logits`.

    Returns:
        None without predictions or known labels, or if the labels have another shape.
    """
    if predict is None or labels is None:
        return None
    found = predict(logits)[: len(labels)]
    known = is_labeled(labels)
    if labels.ndim == found.ndim + 1 and labels.is_floating_point():
        labels, known = labels.argmax(-1), known.all(-1)
    if labels.ndim < found.ndim and found.shape[-1] == 1:  # the binary task has one logit
        found = found.squeeze(-1)
    if labels.shape != found.shape or not known.any():
        return None
    return Accuracy(int((labels == found)[known].sum()), int(known.sum()))


def join_labels(labels: Sequence[Tensor | None]) -> Tensor | None:
    """Join the labels of batches, (N, ...). Those of fewer tokens are padded with -100. None if a batch has none."""
    parts = [part for part in labels if part is not None]
    if len(parts) < len(labels) or len({part.ndim for part in parts}) != 1:
        return None
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([_padded(part, largest, IGNORE_INDEX) for part in parts])
