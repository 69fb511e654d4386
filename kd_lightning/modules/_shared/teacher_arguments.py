"""What every method that learns from frozen teachers checks."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task
from kd_lightning.teachers.checks import Finding, of_teacher
from kd_lightning.teachers.teacher import Teacher


def check_soft_weight(soft_weight: float) -> None:
    """Raise InputError unless it lies in [0, 1]."""
    if not 0.0 <= soft_weight <= 1.0:
        raise InputError(f"soft_weight must lie in [0, 1], got {soft_weight}")


def make_soft_loss(soft_loss: nn.Module | None, task: Task, teachers: Iterable[nn.Module | None] = ()) -> nn.Module:
    """The given one, of the module's task, which must do with what teachers keep; None: ``KDLoss`` at T = 4."""
    soft_loss = KDLoss(temperature=4.0, task=task) if soft_loss is None else soft_loss
    if getattr(soft_loss, "task", task) != task:
        raise InputError(f"soft_loss is for the {soft_loss.task} task, but the module's task is {task}")
    few = any(isinstance(teacher, Teacher) and teacher.cache_top_k is not None for teacher in teachers)
    if few and not getattr(soft_loss, "takes_top_k", False):
        raise InputError(
            f"soft_loss: {soft_loss} looks at every logit, but a teacher's cache_top_k keeps a few alone; leave that "
            "out, or take KDLoss or DKDLoss, without standardize"
        )
    return soft_loss


def check_same_teacher(name: str, teacher: Teacher, before: str) -> None:
    """Raise InputError if a checkpoint's fingerprint is not the teacher's."""
    if teacher.fingerprint() != before:
        raise InputError(
            f"{name}: the checkpoint was trained under another one (fingerprint {before[:12]}..., this one has "
            f"{teacher.fingerprint()[:12]}...); resume with the same weights, preprocess and classes"
        )


def say(findings: list[Finding], about: str = "teacher") -> None:
    """Print what the first look at a teacher found; warn of what is wrong."""
    if about != "teacher":
        findings = [of_teacher(finding, about) for finding in findings]
    if fine := [f"{finding.name}: {finding.text}" for finding in findings if finding.hint is None]:
        rank_zero_info("; ".join(fine))
    for finding in findings:
        if finding.hint is not None:
            advice = "python -m kd_lightning doctor looks closer"
            rank_zero_warn(f"{finding.name}: {finding.text}: {finding.hint} ({advice})")


def is_fitting(module: LightningModule) -> bool:
    """Whether a trainer fits this module, rather than tests it."""
    return module._trainer is not None and module.trainer.state.fn == TrainerFn.FITTING
