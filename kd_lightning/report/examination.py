"""Doctor's checks of a module on its training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from kd_lightning.batch import Batch
from kd_lightning.data.batch_transfer import own_hooks, read_by
from kd_lightning.data.evaluation_batches import batches_of, count_labels, evaluation_batches
from kd_lightning.data.transforms.normalize import Normalize
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.losses.protocols import is_own
from kd_lightning.modules import FeatureDistillModule, PseudoLabelModule, SupervisedModule
from kd_lightning.modules.teaching_steps import Teaching
from kd_lightning.report.feature_examination import examine_features
from kd_lightning.report.taught_module import TaughtModule
from kd_lightning.report.teacher_examination import LabeledSamples, check_ensemble, check_teacher
from kd_lightning.report.why import History, Why, find_teachers
from kd_lightning.teachers.cross_fitted import CrossFittedTeacher
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.findings import Finding, collect_rows
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.training_checks import gradients, labels

NO_HISTORY = History()


def examine(owner: Any, data: Any, history: History = NO_HISTORY) -> Iterator[Finding]:
    """Run all checks of a module on its training data. If it has teachers, they are checked first.

    If there is a soft term, what decides whether the teacher helps is measured, too, and the last finding is a verdict.

    Args:
        owner: A SupervisedModule with ``teacher`` or ``ensemble`` and ``soft_loss``, or without; a
            FeatureDistillModule; or any LightningModule that :class:`~kd_lightning.teach` has changed.
        data: A datamodule, or a module with its own loaders.
        history: Config and finished runs. Default: none is known.

    Raises:
        InputError: If a module that is taught cannot be checked, see :class:`TaughtModule`.
    """
    data.prepare_data()
    data.setup("fit")
    if isinstance(owner, SupervisedModule):
        owner.balance_classes(data)
    if isinstance(owner, PseudoLabelModule):
        owner.set_up_selection(data)
    module: Any = TaughtModule(owner) if isinstance(getattr(owner, "teaching", None), Teaching) else owner
    loader, hooks = data.train_dataloader(), own_hooks(owner)
    training = _training_batch(loader, read_by(data, hooks, module.unpack), owner.device)
    module.eval()
    if isinstance(module, FeatureDistillModule):
        found = evaluation_batches(read_by(data, hooks, module.unpack), owner.device)
        yield from examine_features(module, training, *(found or ([training], "labels of a training batch")))
        return
    findings: list[Finding] = []
    for finding in _usual_checks(owner, module, data, loader, training):
        findings.append(finding)
        yield finding
    if getattr(module, "has_soft_term", True) and (teachers := find_teachers(module)):
        readers = [read_by(data, hooks, one) for one in (_unpack_evaluation(module), module.unpack)]
        why = Why(module, teachers, data, lambda trains: readers[trains], owner.device, history)
        yield from why.findings(findings, training)


def _usual_checks(owner: Any, module: Any, data: Any, loader: Any, training: Batch) -> Iterator[Finding]:
    hooks = own_hooks(owner)
    task, teacher, ensemble = module.task, getattr(module, "teacher", None), getattr(module, "ensemble", None)
    if isinstance(teacher, Teacher) or isinstance(ensemble, Ensemble):
        found = evaluation_batches(read_by(data, hooks, _unpack_evaluation(module)), owner.device)
        batches, what = found or ([training], "labels of a training batch")
        for one in [teacher] if isinstance(teacher, Teacher) else ensemble or ():
            one.find_samples(data, "train")
            if isinstance(one, CrossFittedTeacher):
                yield Finding("cross-fitting", one.describe_samples())
        to_rows = getattr(module, "to_rows", None)
        own_labels = is_own(module.hard_loss) if to_rows else False
        sample = LabeledSamples(batches, what, _normalised(data), to_rows, own_labels)
        student = sample.rows(lambda batch: module(batch.x), task)
        soft_loss = getattr(module, "soft_loss", nn.Identity())
        if isinstance(teacher, Teacher):
            has_soft_term = getattr(module, "has_soft_term", True)
            yield from check_teacher(teacher, student, sample, soft_loss if has_soft_term else None, task)
        elif isinstance(ensemble, Ensemble):
            yield from check_ensemble(ensemble, student, sample, soft_loss, task)
    rows = collect_rows(lambda batch: module(batch.x), [training], task, getattr(module, "to_rows", None))
    classes, positions = rows.logits.shape[1], None if rows.sample is None else rows.y
    y, what = training.y, "samples of a training batch"
    if isinstance(loader, ViewLoader) and isinstance(loader.dataset, ViewDataset):
        y, what = loader.labels.y[loader.dataset.indices], "training samples"
    names = None if task in ("binary", "regression") else getattr(data, "class_names", None)
    expected = module.num_classes or (len(names) if names else None)
    taught = isinstance(teacher, Teacher) or ensemble is not None
    yield labels(y, len(training), classes, task, what, taught=taught, expected=expected, positions=positions)
    if (features := getattr(module, "features", None)) and not features.is_built:
        module.build_features(training, samples=len(data.samples) if hasattr(data, "samples") else None)
    module.train()
    terms = {name: term for name, term in module.losses(training).items() if not name.startswith("teacher_")}
    terms.pop("regularizer", None)  # small on purpose
    accepted = ("unsupervised",) if isinstance(module, PseudoLabelModule) else ()
    yield gradients(terms, module.student, labeled=count_labels(training) > 0, of_pseudo_labels=accepted)


def _unpack_evaluation(module: Any) -> Callable[[Any], Batch]:
    read: Callable[[Any], Batch] = module.unpack_evaluation if isinstance(module, TaughtModule) else module.unpack
    return read


def _training_batch(loader: Any, data: Any, device: torch.device) -> Batch:
    """Return the first training batch with labels among the first 8, else the first batch."""
    batches = list(islice(batches_of(loader, data, device, training=True), 8))
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
