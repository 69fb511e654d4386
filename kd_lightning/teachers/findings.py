"""Findings: what checks return, and the labeled outputs that they work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kd_lightning.batch import Batch, class_labels, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.inputs import describe
from kd_lightning.losses.base import Task
from kd_lightning.teachers.intervals import share_interval

_POSITIONS = 256  # of a dense sample, evenly spaced: its neighbours tell little more
_MOST_OUTPUTS = 2**26  # numbers of all dense samples together


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        name: What was checked.
        text: What was found, in one line.
        hint: What to do about it. Default: None, which means that nothing is wrong.
        severity: ``"error"`` means that training is pointless. Otherwise a finding with a hint is a ``"warning"``, and
            one without a hint is an ``"info"``.
        reason: Why the teacher may not help, a key of :data:`~kd_lightning.teachers.reasons.REASONS`, if the finding
            is evidence of it. Default: None.
        lines: Lines of YAML that change the config as the hint proposes. Default: None, which means none.
    """

    name: str
    text: str
    hint: str | None = None
    severity: Literal["info", "warning", "error"] = "info"
    reason: str | None = None
    lines: str | None = None

    def __post_init__(self) -> None:
        if self.hint is not None and self.severity == "info":
            object.__setattr__(self, "severity", "warning")


def with_teacher_name(finding: Finding, teacher: str) -> Finding:
    """Add the name of a teacher to a finding's name."""
    return replace(finding, name=teacher if finding.name == "teacher" else f"{teacher}, {finding.name}")


class Rows(NamedTuple):
    """A network's outputs and the labels of the same rows."""

    logits: Tensor  # (N, C)
    y: Tensor | None
    sample: Tensor | None  # (N,) number of the sample that a row is a position of; None if each row is a sample


class LabeledLogits(NamedTuple):
    """A network's logits, or values, and the labels of the same rows."""

    logits: Tensor  # (N, C); (N, 1) for the binary task
    y: Tensor  # (N,) class indices, or (N, L) of zeros and ones or values, NaN where missing
    correct: Tensor  # a boolean for each known label; none for the regression task
    sample: Tensor | None = None  # see Rows

    @property
    def accuracy(self) -> float:
        """Share of correct decisions."""
        return float(self.correct.double().mean())

    @property
    def samples(self) -> int:
        """Number of samples. Positions of one sample depend on one another."""
        return len(self.y) if self.sample is None else int(torch.unique(self.sample).numel())

    @property
    def owner(self) -> Tensor | None:
        """The sample of each decision; None if each row is a sample."""
        if self.sample is None or self.y.ndim == 1:
            return self.sample
        return self.sample[:, None].expand_as(self.y)[is_labeled(self.y)]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Clopper-Pearson).

        All labels of one sample count as one decision, since they are not independent. So the interval of the
        multilabel task, and that of dense samples, is rather too wide than too narrow.
        """
        return share_interval(self.accuracy, self.samples)


@torch.no_grad()
def collect_logits(network: Callable[[Batch], Tensor], batches: Sequence[Batch], task: Task) -> Tensor:
    """Compute the logits (N, C) of all samples, on the CPU in at least float32."""
    return _of_task(torch.cat([_run(network, batch).cpu() for batch in batches]), task)


@torch.no_grad()
def collect_rows(
    network: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    task: Task,
    to_rows: Callable[..., Any] | None = None,
    first: int = 0,
    count: int | None = None,
) -> Rows:
    """Compute the outputs of all samples, on the CPU in at least float32. Of a dense sample some positions count.

    Args:
        network: Computes the outputs of a batch.
        batches: The batches.
        task: Their task.
        to_rows: Turns a batch and its dense outputs into rows, as that of a module. Default: None, which means that
            outputs are (B, C).
        first: Number of the first sample.
        count: Number of samples in all. Default: None, which means those of the batches.
    """
    parts: list[Rows] = []
    count = sum(map(len, batches)) if count is None else count
    for batch in batches:
        output = _run(network, batch)
        if to_rows is None:
            parts.append(Rows(output.cpu(), batch.y, None))
            continue
        numbers = torch.arange(first, first + len(batch), device=output.device)
        numbered = replace(batch, index=numbers, candidates=None, soft=None)
        rows, logits = to_rows(numbered, output)
        if rows is numbered:  # of no dense module
            parts.append(Rows(output.cpu(), batch.y, None))
            continue
        first += len(batch)
        keep = _spread(rows.index, max(1, min(_POSITIONS, _MOST_OUTPUTS // max(count * logits.shape[1], 1))))
        y = None if rows.y is None else rows.y[keep].cpu()
        parts.append(Rows(logits[keep].cpu(), y, rows.index[keep].cpu()))
    rows = join(parts)
    return rows._replace(logits=_of_task(rows.logits, task))


def join(parts: Sequence[Rows]) -> Rows:
    """Join rows on the CPU. If a part has no labels, all have none."""
    labels = [part.y.cpu() for part in parts if part.y is not None]
    samples = [part.sample for part in parts if part.sample is not None]
    y = torch.cat(labels) if len(labels) == len(parts) else None
    return Rows(torch.cat([part.logits for part in parts]), y, torch.cat(samples) if samples else None)


def _run(network: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    try:
        return network(batch)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"a network cannot take inputs of shape {describe(batch.x)}: {reason}") from error


def _of_task(logits: Tensor, task: Task) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if task == "multiclass" else logits.reshape(len(logits), -1)


def _spread(sample: Tensor, most: int) -> Tensor:
    """Return which rows to keep, (N,) booleans: of each sample at most so many, evenly spaced.

    Args:
        sample: (N,) numbers of the samples, ascending.
        most: The number.
    """
    counts = torch.unique_consecutive(sample, return_counts=True)[1]
    count = counts.repeat_interleave(counts)
    place = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    keep: Tensor = (count <= most) | ((place + 1) * most // count > place * most // count)
    return keep


def match_labels(logits: Tensor, y: Tensor | None, task: Task, sample: Tensor | None = None) -> LabeledLogits:
    """Match logits (N, C) with labels. Rows without any label are left out.

    Args:
        logits: The logits, or the values of the regression task.
        y: The labels.
        task: Their task.
        sample: The sample of each row, see :class:`Rows`.

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
        logits, labels = logits[known], y[known]
        y = labels.long()
        if (fractions := labels[labels != y]).numel():
            raise InputError(f"labels must be whole class numbers, got {fractions[0].item():g}")
        if len(y) and not 0 <= y.min() <= y.max() < logits.shape[1]:
            raise InputError(f"labels must be 0 ... {logits.shape[1] - 1}, got {y.min()} ... {y.max()}")
        return LabeledLogits(logits, y, logits.argmax(dim=1) == y, None if sample is None else sample[known])
    rows = known.any(dim=1)
    sample = None if sample is None else sample[rows]
    logits, y, known = logits[rows], y[rows].double().masked_fill(~known[rows], math.nan), known[rows]
    right = ((logits > 0) == (y > 0.5))[known]
    return LabeledLogits(logits, y, right[:0] if task == "regression" else right, sample)
