"""``doctor --config ...``: check a teacher on the data before training. Takes the arguments of ``fit``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from kd_lightning.batch import Batch
from kd_lightning.cli.main import InspectCLI
from kd_lightning.data.evaluation_batches import batches_of, count_labels, evaluation_batches
from kd_lightning.data.transforms.normalize import Normalize
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, temperature_of
from kd_lightning.modules import SupervisedModule
from kd_lightning.teachers.checks import (
    accuracy,
    class_order,
    eval_mode,
    gradients,
    labels,
    normalisation,
    soft_targets,
)
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.findings import Finding, collect_logits, match_labels, with_teacher_name
from kd_lightning.teachers.teacher import Teacher, check_outputs

MARKS = {"info": "ok", "warning": "warn", "error": "STOP"}


def main(options: Namespace) -> None:
    """Print a line for each check. Exit with status 1 if a finding is an error."""
    findings = DoctorCLI(["fit", *options.overrides]).findings
    for finding in findings:
        print(f"{MARKS[finding.severity]:<6}{finding.name}: {finding.text}")
        if finding.hint:
            print(f"      -> {finding.hint}")
    if any(finding.severity == "error" for finding in findings):
        sys.exit(1)


class DoctorCLI(InspectCLI):
    """Builds what ``fit`` builds, and checks it instead of training it."""

    findings: list[Finding]

    def fit(self, model: nn.Module, datamodule: Any = None, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Called in place of ``Trainer.fit``. Runs the checks."""
        if not isinstance(model, SupervisedModule):
            raise InputError(f"model: doctor needs a SupervisedModule or a subclass of it, got {type(model).__name__}")
        if ckpt_path is not None:
            raise InputError(f"ckpt_path: doctor checks the start of a run, so it must be left out, got {ckpt_path}")
        model.to(self.trainer.strategy.root_device)
        self.findings = list(examine(model, model if datamodule is None else datamodule))


def examine(module: SupervisedModule, data: Any) -> Iterator[Finding]:
    """Run all checks of a module on its training data. If it has teachers, they are checked first.

    Args:
        module: A module with ``teacher`` or ``ensemble`` and ``soft_loss``, or without.
        data: A datamodule, or a module with its own loaders.
    """
    data.prepare_data()
    data.setup("fit")
    task, teacher, ensemble = module.task, getattr(module, "teacher", None), getattr(module, "ensemble", None)
    loader = data.train_dataloader()
    training = _training_batch(loader, data, module.device)
    module.eval()
    if isinstance(teacher, Teacher) or isinstance(ensemble, Ensemble):
        batches, what = evaluation_batches(data, module.device) or ([training], "labels of a training batch")
        sample = _Sample(batches, what, _normalised(data))
        student = collect_logits(lambda batch: module(batch.x), batches, task)
        soft_loss = getattr(module, "soft_loss", nn.Identity())
        if isinstance(teacher, Teacher):
            yield from _check_teacher(teacher, student, sample, soft_loss, task)
        elif isinstance(ensemble, Ensemble):
            yield from _check_ensemble(ensemble, student, sample, soft_loss, task)
    classes = collect_logits(lambda batch: module(batch.x), [training], task).shape[1]
    y, what = training.y, "samples of a training batch"
    if isinstance(loader, ViewLoader) and isinstance(loader.dataset, ViewDataset):
        y, what = loader.labels.y[loader.dataset.indices], "training samples"
    names = None if task == "binary" else getattr(data, "class_names", None)
    expected = module.num_classes or (len(names) if names else None)
    taught = isinstance(teacher, Teacher) or ensemble is not None
    yield labels(y, len(training), classes, task, what, taught=taught, expected=expected)
    module.train()
    terms = {name: term for name, term in module.losses(training).items() if not name.startswith("teacher_")}
    yield gradients(terms, module.student, labeled=count_labels(training) > 0)


class _Sample(NamedTuple):
    """Labeled samples, their name in texts, and the mean and standard deviation of their normalisation."""

    batches: list[Batch]
    what: str
    normalised: tuple[Any, Any] | None

    @property
    def y(self) -> Tensor | None:
        """All labels."""
        labels = [batch.y for batch in self.batches if batch.y is not None]
        return torch.cat(labels) if labels else None


def _check_teacher(
    teacher: Teacher, student: Tensor, sample: _Sample, soft_loss: nn.Module, task: Task
) -> Iterator[Finding]:
    logits = collect_logits(teacher, sample.batches, task)
    check_outputs(student, logits)
    matched = match_labels(logits, sample.y, task)
    yield accuracy(matched, match_labels(student, sample.y, task), task, sample.what)
    normalised, corrected = normalisation(teacher, sample.batches, matched, task, sample.normalised)
    yield normalised
    yield class_order(corrected, task, teacher.classes)
    yield eval_mode(teacher, sample.batches[0])
    yield soft_targets(logits, soft_loss, task)


def _check_ensemble(
    ensemble: Ensemble, student: Tensor, sample: _Sample, soft_loss: nn.Module, task: Task
) -> Iterator[Finding]:
    """Check each teacher and the whole ensemble. Teachers that lack a class have the eval mode check only."""
    flat = collect_logits(lambda batch: ensemble(batch).transpose(0, 1), sample.batches, task)
    together = flat.reshape(len(flat), len(ensemble), -1).transpose(0, 1)
    ensemble.check_classes(together, 1 if task == "binary" else student.shape[-1])
    for number, teacher in enumerate(ensemble):
        if ensemble.known_classes(student.shape[-1])[number].all():
            found = _check_teacher(teacher, student, sample, soft_loss, task)
        else:
            without_classes = copy(teacher)
            without_classes.classes = None  # so that no logit is minus infinity
            found = iter([eval_mode(without_classes, sample.batches[0])])
        yield from (with_teacher_name(finding, f"teachers[{number}]") for finding in found)
    pooled = match_labels(ensemble.pool(together), sample.y, task)
    yield replace(accuracy(pooled, match_labels(student, sample.y, task), task, sample.what), name="ensemble")
    temperature = temperature_of(soft_loss)
    yield soft_targets(ensemble.pool(together, None, temperature), soft_loss, task)


def _training_batch(loader: Any, data: Any, device: torch.device) -> Batch:
    """Return the first training batch with labels among the first 8, else the first batch."""
    batches = list(islice(batches_of(loader, data, device), 8))
    if not batches:
        raise InputError("data: the training part is empty")
    return next((batch for batch in batches if count_labels(batch)), batches[0])


def _normalised(data: Any) -> tuple[Any, Any] | None:
    """Return mean and standard deviation of the last Normalize in the evaluation transforms, or None."""
    found = None
    steps = [getattr(data, "eval_transform", None)]
    while steps:
        step = steps.pop(0)
        if isinstance(step, v2.Normalize | transforms.Normalize | Normalize):
            found = step.mean, step.std
        inner = step if isinstance(step, nn.Sequential) else getattr(step, "transforms", [])
        steps[:0] = list(inner)
    return found
