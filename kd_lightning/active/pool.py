"""Collect the network outputs of the unlabeled pool, which the query strategies score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kd_lightning.active.strategies import PoolOutputs, check_installed
from kd_lightning.batch import Batch
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.batch_transfer import transfer
from kd_lightning.data.labels.several_labels import has_several_labels
from kd_lightning.data.sources.targets import has_label, has_one_class
from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.modules.seams import Seams
from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.teacher import Teacher, check_outputs

DROPOUT_PASSES = 20
"""Number of forward passes with dropout for BALD."""
_NEEDS_FEATURES = ("k-centre", "badge")


@torch.no_grad()
def collect_pool_outputs(
    student: nn.Module,
    data: SemiSupervisedDataModule,
    strategy: str,
    *,
    teacher: Callable[[Batch], Tensor] | None = None,
    passes: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    seams: Seams | None = None,
) -> tuple[Tensor, PoolOutputs]:
    """Collect a student's outputs for all samples without a label.

    The probabilities of a sample with a coarse label lie within its superclass.

    Args:
        student: Network that returns logits. It runs in eval mode, and moves to the device.
        data: The datamodule, set up. Samples without a label form the pool even with ``unlabeled: none``.
        strategy: The strategy that will score the outputs. Features are computed only if it needs them.
        teacher: Function from a batch to a teacher's logits, on the device. If None, there are no teacher outputs.
        passes: Number of forward passes with dropout, at least 0, whose outputs become ``member_probabilities``.
        seed: Seed of dropout, and of the strategy.
        device: Device of the computation.
        seams: How the student's module reads a batch and calls the student. Default: None, which means a plain call.

    Returns:
        The samples' indices (N,), ascending, and their outputs.

    Raises:
        InputError: If no sample is left to label, the labels are neither one class each nor (task: multilabel) zeros
            and ones, the pool is the test images, the student has no dropout for ``passes`` or another number of
            outputs than labels, or an output is not finite.
    """
    seams = seams or Seams()
    task = seams.task
    labels, multilabel = data.visible_labels(), task == "multilabel"
    check_labels(labels, task)
    check_installed(strategy, multilabel=multilabel)
    dropout = find_dropout(student) if passes else []
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    student.to(device)
    with evaluating(student):
        torch.manual_seed(seed)
        source = seams.read(with_unlabeled_pool(data))
        for loaded in source.pool_dataloader():
            known = loaded.to(device)
            batch = seams.unpack(transfer(source, loaded, torch.device(device)))
            # hooks and an unpack need not care for these
            batch = replace(batch, y=known.y, index=known.index, candidates=known.candidates)
            logits = seams.logits(student, batch.x)
            if logits.ndim > 2 or not logits.ndim:
                raise InputError(f"the scoring of samples needs logits (B, C), got {[*logits.shape]}")
            outputs["index"].append(known.index.cpu())
            outputs["unlabeled"].append(~has_label(known.y).cpu())
            if multilabel and logits.shape[1:] != labels.shape[1:]:
                shape = [*logits.shape[1:]]
                raise InputError(f"the student must have {labels.shape[1]} logits, one for each label, got {shape}")
            outputs["probabilities"].append(_probabilities(logits, batch, task))
            if strategy in _NEEDS_FEATURES:
                outputs["features"].append(GraphPseudoLabels().features_of(student, batch.x, seams.call).cpu().double())
            if teacher is not None:
                check_outputs(logits, teacher_logits := teacher(batch))
                outputs["teacher_probabilities"].append(_probabilities(teacher_logits, batch, task))
            for layer in dropout:
                layer.train()
            if passes:
                outputs["member_probabilities"].append(_dropout_passes(seams, student, batch, passes))
            student.eval()
    columns = {name: torch.cat(parts) for name, parts in outputs.items()}
    members = columns.get("member_probabilities")
    if members is not None and torch.equal(members, members[:, :1].expand_as(members)):
        raise InputError("bald: all passes through the student have the same outputs; is its dropout never called?")
    index, unlabeled = columns.pop("index"), columns.pop("unlabeled")
    if not unlabeled.any():
        raise InputError("no sample without a label is left to select")
    for name, values in columns.items():
        if not (finite := values.flatten(1).isfinite().all(dim=1)).all():
            what, sample = name.replace("_", " "), int(index[~finite][0])
            raise InputError(f"the {what} of sample {sample} are not finite; did the training diverge?")
    labeled = columns["features"][~unlabeled] if "features" in columns and not unlabeled.all() else None
    columns = {name: values[unlabeled] for name, values in columns.items()}
    if "member_probabilities" in columns:
        columns["member_probabilities"] = columns["member_probabilities"].transpose(0, 1)
    return index[unlabeled], PoolOutputs(**columns, labeled_features=labeled, seed=seed, multilabel=multilabel)


def check_labels(labels: Tensor, task: str) -> None:
    """Raise InputError unless labels are one class each, or zeros and ones (N, L) for the multilabel task."""
    kind = f"{labels.dtype} of shape {[*labels.shape]}"
    if task == "multilabel":
        if not has_several_labels(labels):
            raise InputError(f"task: multilabel needs labels of zeros and ones (N, L), got labels {kind}")
    elif not has_one_class(labels):
        raise InputError(f"active learning needs one class label for each sample, got labels {kind} and task: {task}")


def find_dropout(student: nn.Module) -> list[_DropoutNd]:
    """Return the dropout layers of a student; InputError if there are none with p above 0."""
    found = [layer for layer in student.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if not found:
        raise InputError("bald needs several runs, or a student with dropout (p above 0); this student has none")
    return found


def _dropout_passes(seams: Seams, student: nn.Module, batch: Batch, passes: int) -> Tensor:
    """Return the probabilities of several passes, (B, K, C)."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # attention's fused kernels skip dropout
        logits = (seams.logits(student, batch.x) for _ in range(passes))
        outputs = [_probabilities(one, batch, seams.task) for one in logits]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return torch.stack(outputs, dim=1)


def _probabilities(logits: Tensor, batch: Batch, task: str) -> Tensor:
    """Return probabilities (B, C), float64 on the CPU; of each label for multilabel, of both classes for binary."""
    logits = logits.cpu().double()
    if task == "multilabel":
        return logits.sigmoid()
    if logits.ndim == 1 or logits.shape[1] == 1:
        logits = torch.stack([torch.zeros(len(logits)).double(), logits.flatten()], dim=1)
    return mask_candidates(logits, None if batch.candidates is None else batch.candidates.cpu()).softmax(dim=1)


def with_unlabeled_pool(data: SemiSupervisedDataModule) -> SemiSupervisedDataModule:
    """Return the datamodule, or a copy with ``unlabeled: rest`` if it has no unlabeled pool.

    Raises:
        InputError: If the pool is the test images.
    """
    if data.transductive:
        raise InputError("unlabeled: test; test images get no labels, so there is nothing to select")
    if data.unlabeled == "none":
        data = copy(data)
        data.unlabeled = "rest"
    return data


def find_teacher(module: LightningModule, data: SemiSupervisedDataModule | None = None) -> Callable[[Batch], Tensor]:
    """Return a function from a batch to the logits of a module's frozen teacher or ensemble of teachers.

    Args:
        module: The module.
        data: The datamodule of the batches, in which teachers that depend on samples find theirs. Default: None, which
            means that they know them.

    Raises:
        InputError: If the module has no frozen teacher.
    """
    ensemble = getattr(module, "ensemble", None)
    found = [*ensemble] if isinstance(ensemble, Ensemble) else []
    found = found or [getattr(owner, "teacher", None) for owner in (module, getattr(module, "teaching", None))]
    teachers = [teacher for teacher in found if isinstance(teacher, Teacher)]
    for teacher in teachers if data is not None else ():
        teacher.find_samples(data, "train")
    if isinstance(ensemble, Ensemble):
        return lambda batch: ensemble.pool(ensemble(batch))
    teaching: Any = getattr(module, "teaching", None)
    if teachers:
        return teaching.teacher_logits if teachers[0] is getattr(teaching, "teacher", None) else teachers[0]
    raise InputError(f"disagreement needs a module with a frozen teacher, {type(module).__name__} has none")
