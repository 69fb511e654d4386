"""The networks that label the pool, and how each is called with a batch."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of, pick_logits
from kd_lightning.inputs import Inputs, call
from kd_lightning.pseudo_labels import GraphPseudoLabels
from kd_lightning.runs.student import STUDENT, find_network, student_path
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.teacher import Teacher

Source = Literal["student", "ema", "teacher"] | GraphPseudoLabels


def predict_batch(trainer: Trainer, module: LightningModule, batch: Batch, source: Source) -> Tensor:
    """Return the outputs of the network that labels, (B, C) or (B,), or for a graph features (B, D).

    Args:
        trainer: The trainer.
        module: The module.
        batch: The batch, see :func:`~kd_lightning.runs.student.batch_of_student`.
        source: What labels.

    Raises:
        InputError: If the module has no such network.
    """
    teaching = _teaching_of(module)
    if not isinstance(source, str):
        return source.features_of(student_of(module), batch.x, getattr(module, "call", call))
    if source == "student":
        logits = run(module, batch.x)
    elif source == "ema":
        average = find_average(trainer, module).eval()
        if teaching is not None:
            return _run_taught(average.module if isinstance(average, AveragedModel) else average, batch.x, teaching)
        own = average is getattr(module, "ema", None)  # of the student alone; Lightning's is one of the module
        output = getattr(module, "call", call)(average, batch.x) if own else _run(average, batch.x, module)
        logits = logits_of(output, "the averaged student")
    else:
        teacher = find_teacher(module).eval()
        if isinstance(teacher, Ensemble):
            logits = teacher.pool(teacher(batch))
        elif teaching is not None and teacher is teaching.teacher:
            logits = teaching.teacher_logits(batch)
        else:
            output = teacher(batch) if isinstance(teacher, Teacher) else call(teacher, batch.teacher_x)
            logits = logits_of(output, "the teacher")
    return logits


def run(module: LightningModule, x: Inputs) -> Tensor:
    """Return a module's logits for inputs; of one that is taught those of its network, for the inputs of its step."""
    if (teaching := _teaching_of(module)) is not None:
        return _run_taught(module, x, teaching)
    return logits_of(_run(module, x, module), "the student")


def student_of(module: LightningModule) -> nn.Module:
    """Return a module's student.

    Raises:
        InputError: If it has none.
    """
    path = student_path(module)
    return find_network(module, STUDENT if path is None else path, "PseudoLabelRefresh")


def find_teacher(module: LightningModule) -> nn.Module:
    """Return a module's teacher or ensemble, also that of a module which :class:`~kd_lightning.teach` has changed.

    Raises:
        InputError: If it has none.
    """
    for owner in (module, getattr(module, "teaching", None)):
        for name in ("teacher", "ensemble"):
            if isinstance(found := getattr(owner, name, None), nn.Module):
                return found
    raise InputError(f"source: teacher, but {type(module).__name__} has no teacher")


def find_average(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Return the running average of a module's student, or of the module.

    Raises:
        InputError: If there is none.
    """
    if isinstance(found := getattr(module, "ema", None), nn.Module):
        return found
    averaging = weight_averaging(trainer)
    if averaging is None:
        raise InputError(
            "source: ema needs PseudoLabelModule(ema_decay=...), or Lightning's EMAWeightAveraging as a callback"
        )
    return averaging._average_model or module  # it has no average before its own setup


def _teaching_of(module: LightningModule) -> Any:
    """Return what a module is taught with, see :class:`~kd_lightning.teach`; None if it is not taught."""
    found = getattr(module, "teaching", None)
    return found if isinstance(found, nn.Module) else None


def _run_taught(module: nn.Module, x: Inputs, teaching: Any) -> Tensor:
    """Return the logits of the network of a module that is taught, or of a copy of it."""
    network = find_network(module, teaching.network, "PseudoLabelRefresh")
    return pick_logits(call(network, x), teaching.output, "the student")


def weight_averaging(trainer: Trainer) -> WeightAveraging | None:
    """Return the trainer's callback that averages weights; None if it has none."""
    return next((c for c in getattr(trainer, "callbacks", ()) if isinstance(c, WeightAveraging)), None)


def _run(network: nn.Module, x: Inputs, module: LightningModule) -> Any:
    """Call a module, or an average of it. Modules with a ``call`` of their own take inputs of any form as one."""
    return network(x) if callable(getattr(module, "call", None)) else call(network, x)
