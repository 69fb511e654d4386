"""Checks of a teacher, or of each teacher of an ensemble, on labeled samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.losses.protocols import is_own, temperature_of
from kd_lightning.teachers.checks import accuracy, class_order, eval_mode, normalisation, soft_targets
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.findings import (
    Finding,
    LabeledLogits,
    Rows,
    collect_rows,
    join,
    match_labels,
    with_teacher_name,
)
from kd_lightning.teachers.teacher import Teacher, check_outputs


class LabeledSamples(NamedTuple):
    """Labeled samples, their name in texts, and the mean and standard deviation of their normalisation."""

    batches: list[Batch]
    what: str
    normalised: tuple[Any, Any] | None
    to_rows: Callable[..., Any] | None  # of a SupervisedModule
    own_labels: bool  # whether the hard loss is the project's own, so that labels may have any shape

    def rows(self, network: Callable[[Batch], Tensor], task: Task) -> Rows:
        """Compute a network's outputs."""
        return collect_rows(network, self.batches, task, self.to_rows)

    def match(self, rows: Rows, task: Task) -> LabeledLogits:
        """Match outputs with labels; with none if these are the project's own."""
        try:
            return match_labels(rows.logits, rows.y, task, rows.sample)
        except InputError:
            if not self.own_labels:
                raise
            return match_labels(rows.logits, None, task)


def check_teacher(
    teacher: Teacher, student: Rows, sample: LabeledSamples, soft_loss: nn.Module | None, task: Task
) -> Iterator[Finding]:
    """Check one teacher; ``student`` are the student's outputs for the same samples."""
    rows = sample.rows(teacher, task)
    if soft_loss is None or not is_own(soft_loss):
        check_outputs(student.logits, rows.logits)
    matched = sample.match(rows, task)
    yield accuracy(matched, sample.match(student, task), task, sample.what)
    if task == "regression":
        yield eval_mode(teacher, sample.batches[0])
        return
    normalised, corrected = normalisation(teacher, sample.batches, matched, task, sample.normalised, sample.to_rows)
    yield normalised
    yield class_order(corrected, task, teacher.classes)
    yield eval_mode(teacher, sample.batches[0])
    if soft_loss is not None:
        yield soft_targets(rows.logits, soft_loss, task, rows.sample)


def check_ensemble(
    ensemble: Ensemble, student: Rows, sample: LabeledSamples, soft_loss: nn.Module, task: Task
) -> Iterator[Finding]:
    """Check each teacher and the whole ensemble. Teachers that lack a class have the eval mode check only."""
    found_rows: list[list[Rows]] = [[] for _ in ensemble]
    first, count = 0, sum(map(len, sample.batches))
    for batch in sample.batches:
        outputs = ensemble(batch)
        for parts, output in zip(found_rows, outputs, strict=True):
            network = partial(_constant, output)
            parts.append(collect_rows(network, [batch], task, sample.to_rows, first, count))
        first += len(batch)
    each = [join(parts) for parts in found_rows]
    together, one = torch.stack([rows.logits for rows in each]), each[0]
    single = task == "binary" or student.logits.ndim == 1
    ensemble.check_classes(together, 1 if single else student.logits.shape[-1])
    for number, teacher in enumerate(ensemble):
        if ensemble.known_classes(student.logits.shape[-1])[number].all():
            found = check_teacher(teacher, student, sample, soft_loss, task)
        else:
            without_classes = copy(teacher)
            without_classes.classes = None  # so that no logit is minus infinity
            found = iter([eval_mode(without_classes, sample.batches[0])])
        yield from (_of_one(finding, f"teachers[{number}]") for finding in found)
    pooled = sample.match(Rows(ensemble.pool(together), one.y, one.sample), task)
    yield replace(accuracy(pooled, sample.match(student, task), task, sample.what), name="ensemble")
    if task != "regression":
        pooled_soft = ensemble.pool(together, None, temperature_of(soft_loss))
        yield soft_targets(pooled_soft, soft_loss, task, one.sample)


def _of_one(finding: Finding, name: str) -> Finding:
    """Return the finding about one teacher of several. It is a reason only if the teacher errs everywhere by it."""
    kept = finding.reason if finding.reason in ("class order", "normalisation") else None
    return replace(with_teacher_name(finding, name), reason=kept)


def _constant(output: Tensor, batch: Batch) -> Tensor:
    return output
