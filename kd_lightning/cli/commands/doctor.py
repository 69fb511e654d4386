"""``doctor --config ...``: is this teacher any good on this data? Takes fit's arguments, and trains nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.cli.main import InspectCLI
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.modules import SupervisedModule
from kd_lightning.teachers.checks import (
    Finding,
    accuracy,
    answers,
    class_order,
    eval_mode,
    gradients,
    judge,
    labels,
    normalisation,
    of_teacher,
    soft_targets,
)
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.teacher import Teacher, check_outputs

SAMPLES = 4096  # enough for a thousand classes


def main(args: list[str]) -> None:
    """Print a line for each check; exit with status 1 where the run would be pointless."""
    findings = DoctorCLI(["fit", *args]).findings
    for finding in findings:
        mark = "STOP" if finding.pointless else "look" if finding.hint else "ok"
        print(f"{mark:<6}{finding.name}: {finding.text}")
        if finding.hint:
            print(f"      -> {finding.hint}")
    if any(finding.pointless for finding in findings):
        sys.exit(1)


class DoctorCLI(InspectCLI):
    """Builds what fit would, and examines it."""

    findings: list[Finding]

    def fit(self, model: nn.Module, datamodule: Any = None, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Take the place of ``Trainer.fit``."""
        if not isinstance(model, SupervisedModule):
            raise InputError(f"model: doctor needs a SupervisedModule or one of its kind, got {type(model).__name__}")
        if ckpt_path is not None:
            raise InputError(f"ckpt_path: doctor looks at the start of a run and takes none, got {ckpt_path}")
        model.to(self.trainer.strategy.root_device)
        self.findings = list(examine(model, model if datamodule is None else datamodule))


def examine(module: SupervisedModule, data: Any) -> Iterator[Finding]:
    """All checks of a module on the data that it shall be trained on; with a teacher those of the teacher, too.

    Args:
        module: With a ``teacher`` and a ``soft_loss``, or without.
        data: A datamodule, or a module with loaders of its own.
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
        student = answers(lambda batch: module(batch.x), batches, task)
        soft_loss = getattr(module, "soft_loss", nn.Identity())
        if isinstance(teacher, Teacher):
            yield from _of_teacher(teacher, student, sample, soft_loss, task)
        elif isinstance(ensemble, Ensemble):
            yield from _of_ensemble(ensemble, student, sample, soft_loss, task)
    classes = answers(lambda batch: module(batch.x), [training], task).shape[1]
    y, what = training.y, "samples of a training batch"
    if isinstance(loader, ViewLoader) and isinstance(loader.dataset, ViewDataset):
        y, what = loader.labels.y[loader.dataset.indices], "training samples"
    yield labels(y, len(training), classes, task, what, taught=isinstance(teacher, Teacher) or ensemble is not None)
    module.train()
    terms = {name: term for name, term in module.losses(training).items() if not name.startswith("teacher_")}
    yield gradients(terms, module.student, labeled=_labels(training) > 0)


class _Sample(NamedTuple):
    """Labeled samples to judge by: what they are, and mean and std with which they were normalised."""

    batches: list[Batch]
    what: str
    normalised: tuple[Any, Any] | None

    @property
    def y(self) -> Tensor | None:
        """All labels."""
        labels = [batch.y for batch in self.batches if batch.y is not None]
        return torch.cat(labels) if labels else None


def _of_teacher(
    teacher: Teacher, student: Tensor, sample: _Sample, soft_loss: nn.Module, task: Task
) -> Iterator[Finding]:
    logits = answers(teacher, sample.batches, task)
    check_outputs(student, logits)
    judged = judge(logits, sample.y, task)
    yield accuracy(judged, judge(student, sample.y, task), task, sample.what)
    normalised, cured = normalisation(teacher, sample.batches, judged, task, sample.normalised)
    yield normalised
    yield class_order(cured, task, teacher.classes)
    yield eval_mode(teacher, sample.batches[0])
    yield soft_targets(logits, soft_loss, task)


def _of_ensemble(
    ensemble: Ensemble, student: Tensor, sample: _Sample, soft_loss: nn.Module, task: Task
) -> Iterator[Finding]:
    """Of each teacher that knows all classes, of the others whether they hold still, and of what all say together."""
    flat = answers(lambda batch: ensemble(batch).transpose(0, 1), sample.batches, task)
    together = flat.reshape(len(flat), len(ensemble), -1).transpose(0, 1)
    ensemble.check_classes(together, 1 if task == "binary" else student.shape[-1])
    for number, teacher in enumerate(ensemble):
        if ensemble.knows(student.shape[-1])[number].all():
            found = _of_teacher(teacher, student, sample, soft_loss, task)
        else:
            own = copy(teacher)
            own.classes = None  # its logits alone, without minus infinity for what it does not know
            found = iter([eval_mode(own, sample.batches[0])])
        yield from (of_teacher(finding, f"teachers[{number}]") for finding in found)
    pooled = judge(ensemble.pool(together), sample.y, task)
    yield accuracy(pooled, judge(student, sample.y, task), task, sample.what)._replace(name="ensemble")
    temperature = float(getattr(soft_loss, "temperature", 1.0))
    yield soft_targets(ensemble.pool(together, None, temperature), soft_loss, task)


def _training_batch(loader: Any, data: Any, device: torch.device) -> Batch:
    """One with labels, where that is no long search."""
    batches = list(islice(_batches(loader, data, device), 8))
    if not batches:
        raise InputError("data: the training part is empty")
    return next((batch for batch in batches if _labels(batch)), batches[0])


def evaluation_batches(data: Any, device: torch.device) -> tuple[list[Batch], str] | None:
    """Validation samples with labels; where there are none, labeled training images. Never the test part."""
    if is_overridden("val_dataloader", data):
        batches = _first_labeled(data.val_dataloader(), data, device)
        if batches:
            return batches, "validation labels"
    if isinstance(data, SemiSupervisedDataModule):
        visible = data.visible_labels()
        assert data.split is not None
        dataset = data.train_dataloader().dataset
        assert isinstance(dataset, ViewDataset)
        labeled = ViewDataset(dataset.images, torch.tensor(data.split.labeled), data.eval_transform, data.seed)
        loader = ViewLoader(labeled, LabelTable(visible), batch_size=data.batch_size, num_workers=data.num_workers)
        batches = _first_labeled(loader, data, device)
    else:
        batches = _first_labeled(data.train_dataloader(), data, device)
    return (batches, "labels of training images, for want of validation labels,") if batches else None


def _first_labeled(loader: Any, data: Any, device: torch.device) -> list[Batch]:
    taken, count = [], 0
    for batch in _batches(loader, data, device):
        if _labels(batch):
            taken.append(batch)
        count += len(batch)
        if count >= SAMPLES:
            break
    return taken


def _batches(loader: Any, data: Any, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader (of several the first) as a step would get them."""
    while isinstance(loader, list | tuple | dict):
        parts = list(loader.values() if isinstance(loader, dict) else loader)
        if not parts:
            return
        loader = parts[0]
    for batch in loader:
        batch = data.on_before_batch_transfer(batch, 0)
        batch = move_data_to_device(batch, device)
        yield Batch.from_any(data.on_after_batch_transfer(batch, 0))


def _labels(batch: Batch) -> int:
    return 0 if batch.y is None else int(is_labeled(batch.y).sum())


def _normalised(data: Any) -> tuple[Any, Any] | None:
    """Mean and standard deviation of the last Normalize in the evaluation transforms."""
    found = None
    steps = [getattr(data, "eval_transform", None)]
    while steps:
        step = steps.pop(0)
        if isinstance(step, v2.Normalize | transforms.Normalize):
            found = step.mean, step.std
        inner = step if isinstance(step, nn.Sequential) else getattr(step, "transforms", [])
        steps[:0] = list(inner)
    return found
