"""Doctor's checks of a module on its training data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from kd_lightning.batch import Batch
from kd_lightning.data.evaluation_batches import batches_of, count_labels, evaluation_batches
from kd_lightning.data.transforms.normalize import Normalize
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import Inputs, call
from kd_lightning.losses.base import Task
from kd_lightning.losses.protocols import is_own, temperature_of
from kd_lightning.modules import FeatureDistillModule, SupervisedModule
from kd_lightning.modules.teaching import Teaching
from kd_lightning.report.feature_examination import examine_features
from kd_lightning.runs.student import batch_of_step, check_plain_logits, find_network
from kd_lightning.teachers.checks import (
    accuracy,
    class_order,
    eval_mode,
    normalisation,
    soft_targets,
)
from kd_lightning.teachers.cross_fitted import CrossFittedTeacher
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
from kd_lightning.teachers.training_checks import gradients, labels


def examine(owner: Any, data: Any) -> Iterator[Finding]:
    """Run all checks of a module on its training data. If it has teachers, they are checked first.

    Args:
        owner: A SupervisedModule with ``teacher`` or ``ensemble`` and ``soft_loss``, or without; a
            FeatureDistillModule; or any LightningModule that :class:`~kd_lightning.teach` has changed.
        data: A datamodule, or a module with its own loaders.

    Raises:
        InputError: If a module that is taught cannot be checked, see :class:`_Taught`.
    """
    data.prepare_data()
    data.setup("fit")
    if isinstance(owner, SupervisedModule):
        owner.balance_classes(data)
    module: Any = _Taught(owner) if isinstance(getattr(owner, "teaching", None), Teaching) else owner
    task, teacher, ensemble = module.task, getattr(module, "teacher", None), getattr(module, "ensemble", None)
    loader = data.train_dataloader()
    training = _training_batch(loader, _read_by(owner, data, module.unpack), owner.device)
    module.eval()
    if isinstance(module, FeatureDistillModule):
        found = evaluation_batches(_read_by(owner, data, module.unpack), owner.device)
        yield from examine_features(module, training, *(found or ([training], "labels of a training batch")))
        return
    if isinstance(teacher, Teacher) or isinstance(ensemble, Ensemble):
        read = module.unpack_evaluation if isinstance(module, _Taught) else module.unpack
        found = evaluation_batches(_read_by(owner, data, read), owner.device)
        batches, what = found or ([training], "labels of a training batch")
        for one in [teacher] if isinstance(teacher, Teacher) else ensemble or ():
            one.find_samples(data, "train")
            if isinstance(one, CrossFittedTeacher):
                yield Finding("cross-fitting", one.describe_samples())
        to_rows = getattr(module, "to_rows", None)
        sample = _Sample(batches, what, _normalised(data), to_rows, is_own(module.hard_loss) if to_rows else False)
        student = sample.rows(lambda batch: module(batch.x), task)
        soft_loss = getattr(module, "soft_loss", nn.Identity())
        if isinstance(teacher, Teacher):
            has_soft_term = getattr(module, "has_soft_term", True)
            yield from _check_teacher(teacher, student, sample, soft_loss if has_soft_term else None, task)
        elif isinstance(ensemble, Ensemble):
            yield from _check_ensemble(ensemble, student, sample, soft_loss, task)
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
    yield gradients(terms, module.student, labeled=count_labels(training) > 0)


class _Taught:
    """What :func:`examine` needs of a module that is taught. Its own steps show what its network is called with.

    Raises:
        InputError: If its logits are no (B, C), it has no teacher or optimises by hand, labels are no classes, or a
            step cannot run without a trainer.
    """

    ensemble, num_classes = None, None

    def __init__(self, module: LightningModule) -> None:
        teaching: Any = module.teaching
        check_plain_logits(module, "doctor")
        if teaching.teacher is None or not module.automatic_optimization:
            what = "automatic optimisation" if teaching.teacher is not None else "a teacher"
            raise InputError(f"model: doctor needs a module with {what} to check teach")
        self.teacher, self.soft_loss = teaching.teacher, teaching.soft_loss
        self.task: Task = getattr(self.soft_loss, "task", "multiclass")
        self.student = find_network(module, teaching.network, "model")
        self.eval, self.train = module.eval, module.train
        self._module: Any = module
        self._loaded: list[tuple[Batch, Any]] = []  # training batches, and what they were loaded as

    def __call__(self, x: Inputs) -> Tensor:
        return logits_of(call(self.student, x), "the student")

    def unpack(self, loaded: Any) -> Batch:
        batch = self._checked(batch_of_step(self._module, loaded, "training_step"))
        self._loaded.append((batch, loaded))
        return batch

    def unpack_evaluation(self, loaded: Any) -> Batch:
        return self._checked(batch_of_step(self._module, loaded))

    def _checked(self, batch: Batch) -> Batch:
        if batch.y is not None and batch.y.is_floating_point() and not hasattr(self.soft_loss, "task"):
            name = type(self.soft_loss).__name__
            raise InputError(f"model: doctor compares classes, got labels of {batch.y.dtype} and soft_loss {name}")
        return batch

    def losses(self, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of both terms: the loss at soft weight 0, and at 1.

        If one of them is not finite, the other one is not either, since 0 times it is not.
        """
        loaded = next(loaded for known, loaded in self._loaded if known is batch)
        weight = self._module.soft_weight
        return {"hard": (1 - weight, self._loss(loaded, 0.0)), "soft": (weight, self._loss(loaded, 1.0))}

    def _loss(self, loaded: Any, soft_weight: float) -> Tensor:
        before, self._module.soft_weight = self._module.soft_weight, soft_weight
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*self.log.*")  # there is no trainer
                returned = self._module.training_step(loaded, 0)
        except InputError:
            raise
        except Exception as error:  # of a step that needs more of a fit can be anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"model: doctor cannot run training_step without a trainer: {reason}") from error
        finally:
            self._module.soft_weight = before
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, Tensor):
            raise InputError(f"model: training_step must return a loss, got {type(returned).__name__}")
        return loss


class _Sample(NamedTuple):
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


def _check_teacher(
    teacher: Teacher, student: Rows, sample: _Sample, soft_loss: nn.Module | None, task: Task
) -> Iterator[Finding]:
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


def _check_ensemble(
    ensemble: Ensemble, student: Rows, sample: _Sample, soft_loss: nn.Module, task: Task
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
            found = _check_teacher(teacher, student, sample, soft_loss, task)
        else:
            without_classes = copy(teacher)
            without_classes.classes = None  # so that no logit is minus infinity
            found = iter([eval_mode(without_classes, sample.batches[0])])
        yield from (with_teacher_name(finding, f"teachers[{number}]") for finding in found)
    pooled = sample.match(Rows(ensemble.pool(together), one.y, one.sample), task)
    yield replace(accuracy(pooled, sample.match(student, task), task, sample.what), name="ensemble")
    if task != "regression":
        pooled_soft = ensemble.pool(together, None, temperature_of(soft_loss))
        yield soft_targets(pooled_soft, soft_loss, task, one.sample)


def _constant(output: Tensor, batch: Batch) -> Tensor:
    return output


def _read_by(module: LightningModule, data: Any, unpack: Callable[[Any], Batch]) -> Any:
    """Return the data with batches as a module gets them: by its own hooks where the data have none."""
    data = copy(data)
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        if not is_overridden(hook, data):
            setattr(data, hook, getattr(module, hook))
    data.unpack = unpack
    return data


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
