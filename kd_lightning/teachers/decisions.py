"""A network's decisions on labeled samples, sample by sample, and how those of two networks or views compare."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.losses.base import Task
from kd_lightning.teachers.findings import LabeledLogits
from kd_lightning.teachers.intervals import Interval, difference_interval, mean_interval, share_interval
from kd_lightning.teachers.regression_checks import mean_of_samples


class Decisions(NamedTuple):
    """Shares of right decisions, a number for each sample: views and positions of a sample count as one.

    Attributes:
        sample: (S,) numbers of the samples, ascending.
        right: (S,) share of right decisions of each sample.
        confidence: (S,) mean probability of the decision.
        wrong_confidence: Mean probability of the wrong decisions; NaN without any.
    """

    sample: Tensor
    right: Tensor
    confidence: Tensor
    wrong_confidence: float

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def accuracy(self) -> float:
        """Mean share of right decisions."""
        return float(self.right.mean())

    @property
    def interval(self) -> Interval:
        """95 % interval of the accuracy, with one decision for each sample."""
        return share_interval(self.accuracy, len(self))

    def describe(self, what: str) -> str:
        """Return the accuracy with its interval.

        Args:
            what: Name of the samples.
        """
        low, high = self.interval
        return f"{self.accuracy:.1%} of {len(self)} {what} (95% interval {low:.1%} to {high:.1%})"


def decisions_of(matched: LabeledLogits, task: Task) -> Decisions:
    """Return the decisions of logits with labels.

    Args:
        matched: The logits and the labels. ``sample`` may name views of one sample, too.
        task: Of the labels; not regression.
    """
    if task == "multiclass":
        confidence = matched.logits.double().softmax(dim=1).amax(dim=1)
        owner = matched.sample
    else:
        positive = matched.logits.double().sigmoid()
        confidence = torch.maximum(positive, 1 - positive)[is_labeled(matched.y)]
        owner = torch.arange(len(matched.y)) if matched.sample is None else matched.sample
        owner = owner[:, None].expand_as(matched.y)[is_labeled(matched.y)]
    owner = torch.arange(len(matched.correct)) if owner is None else owner
    sample, place, counts = torch.unique(owner, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(sample), dtype=torch.double)
    right, sure = (zeros.index_add(0, place, part.double()) / counts for part in (matched.correct, confidence))
    wrong = confidence[~matched.correct]
    return Decisions(sample, right, sure, float(wrong.mean()) if len(wrong) else float("nan"))


class Difference(NamedTuple):
    """A difference of two accuracies, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points (95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"


def between_samples(first: Decisions, second: Decisions) -> Difference:
    """Return ``first - second`` for decisions on different samples."""
    ends = difference_interval(first.accuracy, len(first), second.accuracy, len(second))
    return Difference(first.accuracy - second.accuracy, *ends)


def on_same_samples(first: Decisions, second: Decisions) -> Difference:
    """Return ``first - second`` for decisions on the same samples."""
    change = first.right - second.right
    low, high = mean_interval(change)
    return Difference(float(change.mean()), max(low, -1.0), min(high, 1.0))


class Change(NamedTuple):
    """What a teacher changes in its student's decisions, split by whether the teacher itself is right.

    Attributes:
        where_right: Change of the accuracy that comes from decisions where the teacher is right.
        where_wrong: Change that comes from those where it is wrong. The two add up to the whole change.
    """

    where_right: Difference
    where_wrong: Difference

    @property
    def errors_harm(self) -> bool:
        """Whether the teacher's errors may be what harms.

        They are not if the student loses where the teacher is right (the 95 % interval excludes 0), and more there than
        where it is wrong.
        """
        right, wrong = self.where_right, self.where_wrong
        return right.high >= 0 or right.value >= wrong.value

    def __str__(self) -> str:
        return f"{self.where_right} where the teacher is right, {self.where_wrong} where it is wrong"


def change_by_teacher(teacher: LabeledLogits, taught: LabeledLogits, alone: LabeledLogits) -> Change:
    """Return how a student that was taught differs from one that was trained alone, by the teacher's decisions.

    Args:
        teacher: The teacher's logits.
        taught: Those of the student that was trained with the teacher, for the same rows.
        alone: Those of the student that was trained without it.
    """
    change = taught.correct.double() - alone.correct.double()
    rows = teacher if teacher.sample is not None else teacher._replace(sample=torch.arange(len(teacher.y)))
    parts = []
    for where in (teacher.correct, ~teacher.correct):
        values = mean_of_samples(change * where, rows.owner)
        low, high = mean_interval(values)
        parts.append(Difference(float(values.mean()), max(low, -1.0), min(high, 1.0)))
    return Change(*parts)
