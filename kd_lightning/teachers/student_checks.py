"""Checks of a student beside its teacher: size, what it learns without the teacher, and whether it follows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import Task, standardize_logits
from kd_lightning.losses.protocols import standardizes, temperature_of
from kd_lightning.teachers.decisions import Decisions, on_same_samples
from kd_lightning.teachers.findings import Finding
from kd_lightning.teachers.intervals import mean_interval, share_interval
from kd_lightning.teachers.regression_checks import LEAST, mean_of_samples

FOLLOWS = 0.80
"""Share of equal decisions below which a trained student does not follow: the upper end of its interval counts."""


def capacity(student: nn.Module, teachers: list[nn.Module], macs: tuple[int, int] | None) -> Finding:
    """Compare the sizes of student and teacher. The gap alone is no reason for a warning.

    Args:
        student: The student.
        teachers: The teacher, or all teachers of an ensemble.
        macs: Multiply-accumulates of student and teachers for one sample. None if they are not known.
    """
    own = sum(parameter.numel() for parameter in student.parameters())
    theirs = sum(parameter.numel() for teacher in teachers for parameter in teacher.parameters())
    text = f"the student has {_number(own)} parameters, the teacher {_number(theirs)} ({_times(theirs, own)})"
    if macs is not None:
        text += f"; {_number(macs[0])} and {_number(macs[1])} MACs ({_times(macs[1], macs[0])})"
    return Finding("capacity", text)


def _number(count: float) -> str:
    for scale, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= scale:
            return f"{count / scale:.3g}{prefix}"
    return f"{count:.0f}"


def _times(large: float, small: float) -> str:
    return f"{large / small:.3g} times" if small else "no student to compare"


def following(
    student: Tensor,
    teacher: Tensor,
    task: Task,
    soft_loss: nn.Module,
    sample: Tensor | None,
    where: str,
    alone: Tensor | None = None,
) -> Finding:
    """Measure how far a trained student follows its teacher on the views that it was taught on.

    There is a warning if the upper end of the 95 % interval of the share of equal decisions is below 80 %: the student
    has not learned what it was shown, because it is too small, or was not trained for long enough. It is not too small
    if the same student, trained without the teacher, decides like the teacher as often. If that one decides like the
    teacher more often (by the interval of the difference on the same samples), there is a warning in any case.

    Args:
        student: The trained student's logits of training views, (N, C).
        teacher: The teacher's.
        task: Of the logits; not regression.
        soft_loss: The loss whose temperature softens both.
        sample: The sample of each row. None if each row is one.
        where: The run of the student.
        alone: Logits of the student that was trained without the teacher. Default: None, which means without such a
            run.
    """
    name = "following"
    same = _alike(student, teacher, task, sample)
    share, n = float(same.mean()) if len(same) else math.nan, len(same)
    if n < LEAST:
        return Finding(name, f"not checked: {n} training samples are too few to judge")
    low, high = share_interval(share, n)
    temperature = temperature_of(soft_loss)
    divergence = float(mean_of_samples(_divergence(student, teacher, task, soft_loss), sample).mean())
    text = f"the student of {where} and the teacher decide alike on {share:.1%} of {n} training samples under training "
    text += f"views (95% interval {low:.1%} to {high:.1%}), KL divergence {divergence:.3g} nats at temperature "
    text += f"{temperature:g}"
    lost = None if alone is None else _alike(alone, teacher, task, sample) - same
    text += "" if lost is None else f"; without the teacher it decides alike on {share + float(lost.mean()):.1%}"
    if high >= FOLLOWS and (lost is None or mean_interval(lost)[0] <= 0):
        return Finding(name, text)
    if lost is not None and lost.mean() >= 0:
        hint = "it is not too small, since it is as near to the teacher without it: soft targets take longer to learn, "
        hint += "so train longer (max_epochs), at a higher learning rate, or lower soft_weight"
        return Finding(name, text, hint, reason="gap")
    hint = "it cannot follow the teacher on the views that it was taught on: train longer (max_epochs), teach it by an "
    hint += "assistant of a size in between, or lower soft_weight"
    return Finding(name, text, hint, reason="gap")


def _alike(student: Tensor, teacher: Tensor, task: Task, sample: Tensor | None) -> Tensor:
    """Return the share of equal decisions of each sample, (S,)."""
    if task == "multiclass":
        same = (student.argmax(dim=1) == teacher.argmax(dim=1)).double()
    else:
        same = ((student > 0) == (teacher > 0)).double().mean(dim=1)
    return mean_of_samples(same, sample)


def _divergence(student: Tensor, teacher: Tensor, task: Task, soft_loss: nn.Module) -> Tensor:
    """Return the KL divergence of each row (N,), in nats, from the teacher's softened probabilities."""
    pair = []
    for logits in (teacher, student):
        logits = standardize_logits(logits) if standardizes(soft_loss) else logits
        soft = logits.double() / temperature_of(soft_loss)
        soft = soft if task == "multiclass" else torch.stack([soft, torch.zeros_like(soft)], dim=-1)
        pair.append(soft.log_softmax(dim=-1))
    p, q = pair
    terms = torch.where(p.isneginf(), 0, p.exp() * (p - q))
    return terms.sum(dim=-1).reshape(len(p), -1).mean(dim=1)


def student_alone(
    teacher: Decisions, alone: Decisions, fitted: Decisions | None, taught: Decisions | None, where: str
) -> Finding:
    """Compare the teacher with the same student trained without it, on validation samples.

    There is a warning if the teacher is right no more often than the student alone: then it has little to teach. This
    does not explain a student that is worse with the teacher, unless the teacher is worse, too. The
    deployed weights of the student are those that are best on the validation part, which favours the student a little.

    Args:
        teacher: The teacher's decisions on validation samples under evaluation transforms.
        alone: Those of the student that was trained alone, on the same samples.
        fitted: Those of the student alone on its labeled training samples. None if they are not known.
        taught: Those of the student of a finished run with the teacher, on the validation samples. None without a run.
        where: The run of the student alone.
    """
    name = "student alone"
    if len(alone) < LEAST:
        return Finding(name, f"not checked: {len(alone)} validation samples are too few to judge")
    ahead = on_same_samples(teacher, alone)
    text = f"{where} is right on {alone.describe('validation samples')}"
    if fitted is not None:
        text += f" and on {fitted.accuracy:.1%} of {len(fitted)} labeled training samples"
    text += f"; the teacher: {ahead}"
    if taught is not None:
        text += f"; the student with the teacher: {on_same_samples(taught, alone)}"
    if ahead.value > 0:
        return Finding(name, text)
    hint = "the teacher is no better than the student alone: use a better teacher, or none"
    harmed = helps(taught, alone) is False and ahead.high >= 0
    return Finding(name, text, hint, reason="level" if harmed else "no better")


def helps(taught: Decisions | None, alone: Decisions | None) -> bool | None:
    """Return whether a finished run with the teacher is better than the student alone, on the same samples.

    The 95 % interval of the difference decides. None if it includes 0, and without such runs.
    """
    if taught is None or alone is None or len(alone) < LEAST:
        return None
    change = on_same_samples(taught, alone)
    return True if change.low > 0 else False if change.high < 0 else None
