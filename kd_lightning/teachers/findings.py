"""Findings: what checks return, and the labeled logits that they work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from kd_lightning.batch import Batch, class_labels, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.inputs import describe
from kd_lightning.losses.base import Task


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        name: What was checked.
        text: What was found, in one line.
        hint: What to do about it. Default: None, which means that nothing is wrong.
        severity: ``"error"`` means that training is pointless. Otherwise a finding with a hint is a ``"warning"``, and
            one without a hint is an ``"info"``.
    """

    name: str
    text: str
    hint: str | None = None
    severity: Literal["info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if self.hint is not None and self.severity == "info":
            object.__setattr__(self, "severity", "warning")


def with_teacher_name(finding: Finding, teacher: str) -> Finding:
    """Add the name of a teacher to a finding's name."""
    return replace(finding, name=teacher if finding.name == "teacher" else f"{teacher}, {finding.name}")


class LabeledLogits(NamedTuple):
    """A network's logits and the labels of the same samples."""

    logits: Tensor  # (N, C); (N, 1) for the binary task
    y: Tensor  # (N,) class indices, or (N, L) of zeros and ones, NaN where missing
    correct: Tensor  # a boolean for each known label

    @property
    def accuracy(self) -> float:
        """Share of correct decisions."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Clopper-Pearson).

        All labels of one sample count as one decision, since they are not independent. So the interval of the
        multilabel task is rather too wide than too narrow.
        """
        n, right = len(self.y), self.accuracy * len(self.y)
        low = float(betaincinv(right, n - right + 1, 0.025)) if right > 0 else 0.0
        high = float(betaincinv(right + 1, n - right, 0.975)) if right < n else 1.0
        return low, high


@torch.no_grad()
def collect_logits(network: Callable[[Batch], Tensor], batches: Sequence[Batch], task: Task) -> Tensor:
    """Compute the logits (N, C) of all samples, on the CPU in at least float32."""
    try:
        logits = torch.cat([network(batch).cpu() for batch in batches])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"a network cannot take inputs of shape {describe(batches[0].x)}: {reason}") from error
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if task == "multiclass" else logits.reshape(len(logits), -1)


def match_labels(logits: Tensor, y: Tensor | None, task: Task) -> LabeledLogits:
    """Match logits (N, C) with labels. Samples without any label are left out.

    Raises:
        InputError: If the labels do not fit the logits.
    """
    if y is None:
        return LabeledLogits(logits[:0], torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    y = class_labels(y).cpu() if task == "multiclass" else y.cpu().reshape(len(y), -1)
    if logits.ndim != 2 or y.shape != logits.shape[: y.ndim] or (y.ndim == 1) != (task == "multiclass"):
        raise InputError(f"{task} labels of shape {[*y.shape]} do not fit logits of shape {[*logits.shape]}")
    known = is_labeled(y)
    if task == "multiclass":
        logits, y = logits[known], y[known].long()
        if len(y) and not 0 <= y.min() <= y.max() < logits.shape[1]:
            raise InputError(f"labels must be 0 ... {logits.shape[1] - 1}, got {y.min()} ... {y.max()}")
        return LabeledLogits(logits, y, logits.argmax(dim=1) == y)
    rows = known.any(dim=1)
    logits, y, known = logits[rows], y[rows].double().masked_fill(~known[rows], math.nan), known[rows]
    return LabeledLogits(logits, y, ((logits > 0) == (y > 0.5))[known])
