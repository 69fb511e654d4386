"""Checks of a teacher before training: is it good on this data? Each check returns one finding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import v2

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses import ConditionalLoss, HardDistillationLoss, TTMLoss
from kd_lightning.losses.base import Task, standardize_logits
from kd_lightning.losses.protocols import standardizes, temperature_of
from kd_lightning.teachers.findings import Finding, LabeledLogits, collect_rows, match_labels
from kd_lightning.teachers.intervals import mean_interval
from kd_lightning.teachers.regression_checks import (
    FEW,
    LEAST,
    SIGMAS,
    error,
    is_above_zero,
    mean_of_samples,
)
from kd_lightning.teachers.teacher import Teacher

MOST_CLASSES = 5000  # whose order is checked: the memory grows with the square
ONE_HOT, UNIFORM = 0.01, 0.995  # shares of the largest entropy; Hinton's digits at T = 20 have about 0.98
POOR = 0.75  # share of the way from chance to perfect accuracy
NORMALISATIONS: dict[str, tuple[list[float], list[float]]] = {
    "[0, 1]": ([0.0], [1.0]),
    "[0, 255]": ([0.0], [1 / 255]),
    "[-1, 1]": ([0.5], [0.5]),
    "ImageNet's mean and std": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "CIFAR-10's mean and std": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "CIFAR-100's mean and std": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "MNIST's mean and std": ([0.1307], [0.3081]),
    "Fashion-MNIST's mean and std": ([0.2860], [0.3530]),
}
"""Usual normalisations: mean and standard deviation of pixels in [0, 1]."""


def accuracy(teacher: LabeledLogits, student: LabeledLogits | None, task: Task, what: str) -> Finding:
    """Compare the teacher's accuracy with chance and with the student's present accuracy.

    Chance is the accuracy of the best constant prediction. Training is pointless if the teacher is no better than
    chance, and no better than predictions of the same class frequencies that ignore the input (Cohen's kappa is 0).
    It is an error if the 95 % interval of the accuracy does not exclude both. Within 3 standard errors of chance there
    is a warning. With fewer than 100 labeled samples there is no error, and a warning only if the whole interval lies
    far below perfect accuracy. All positions of a dense sample count as one decision. For the regression task see
    :func:`~kd_lightning.teachers.regression_checks.error`.

    Args:
        teacher: The teacher's logits and the labels.
        student: The student's. If None, the student is not compared.
        task: Of the labels.
        what: Name of the labels in the text, such as ``"validation labels"``.
    """
    if task == "regression":
        return error(teacher, student, what)
    n, samples = len(teacher.correct), teacher.samples
    if not n:
        return Finding("teacher", f"not checked: there are no {what}")
    if not teacher.logits.isfinite().all():
        rows = int((~teacher.logits.isfinite()).any(dim=1).sum())
        of = "samples" if teacher.sample is None else "positions"
        text = f"its logits are not finite for {rows} of {len(teacher.logits)} {of}"
        return _poor(text, "check its weights, and whether its inputs are finite", severity="error")
    constant, unrelated = _chance(teacher, task)
    against = "" if student is None else f", present student {student.accuracy:.1%}"
    low, high = teacher.interval
    about = f"95% interval {low:.1%} to {high:.1%}, chance {constant:.1%}{against}"
    text = f"{teacher.accuracy:.1%} of {n} {what}{'' if n == samples else f' of {samples} samples'} right ({about})"
    if samples < FEW:
        if low > constant:
            return Finding("teacher", text)
        poor = samples >= LEAST and high < constant + POOR * (1 - constant)
        hint = f"it is poor on these; compare it with chance on at least {FEW} labeled samples" if poor else None
        few = f"{text}; {samples} labeled samples are too few to judge"
        return Finding("teacher", few) if hint is None else _poor(few, hint)
    decisions = _decisions(teacher)
    if constant + _error(constant, decisions) >= 1:
        return Finding("teacher", f"{text}; too few labels for a comparison with chance")
    if teacher.accuracy <= constant + _error(constant, decisions):
        if teacher.accuracy <= unrelated + _error(unrelated, decisions) and low <= min(constant, unrelated):
            hint = "it is no better than chance: is it trained? are its weights, class order and inputs the right ones?"
            return _poor(text, hint, severity="error")
        if low > constant:
            return _poor(text, "it is hardly better than chance; check how it was trained")
        return _poor(text, "a constant prediction is right as often; check how it was trained")
    if student is not None and _gains(student.correct, teacher.correct, teacher.owner):
        hint = "the student is better already; use a better teacher, or lower soft_weight"
        return Finding("teacher", text, hint, reason="no better")
    return Finding("teacher", text)


def _poor(text: str, hint: str, severity: Literal["warning", "error"] = "warning") -> Finding:
    return Finding("teacher", text, hint, severity, "poor")


def class_order(teacher: LabeledLogits, task: Task, present: Sequence[int | None] | None = None) -> Finding:
    """Check whether another order of the classes raises the accuracy sharply.

    The order is found on one half of the samples and tested on the other half. So many classes and few samples do not
    give a false gain. Fewer than 100 labeled samples, and more than 5000 classes, are not judged.

    Args:
        teacher: The teacher's logits and the labels.
        task: Of the labels.
        present: The teacher's present ``classes``, if it has them.
    """
    name = "class order"
    if reason := _too_few(teacher):
        return Finding(name, reason)
    if task == "binary":
        _, unrelated = _chance(teacher, task)
        if teacher.accuracy >= unrelated - _error(unrelated, _decisions(teacher)):
            return Finding(name, "its positive class is that of the labels")
        n = len(teacher.correct)
        text = f"its positive class is the labels' negative one: {1 - teacher.accuracy:.1%} of {n} are right if swapped"
        hint = "negate weight and bias of its last layer, or swap 0 and 1 in the labels"
        return Finding(name, text, hint, reason="class order")

    if (classes := teacher.logits.shape[1]) > MOST_CLASSES:
        return Finding(name, f"not checked: {classes} classes are too many, at most {MOST_CLASSES}")
    first, sample = _half(teacher), teacher.sample
    other = match_labels(teacher.logits[~first], teacher.y[~first], task, None if sample is None else sample[~first])
    order = _best_order(match_labels(teacher.logits[first], teacher.y[first], task), task)
    mapped = match_labels(_reorder(other.logits, order), other.y, task, other.sample)
    gain = mapped.accuracy - other.accuracy
    # two swapped classes of C cost 2/C of the accuracy; a gain below a quarter of that is mere confusion of classes
    least = 0.5 / classes
    if task == "multilabel":
        share = teacher.y.nanmean(dim=0)
        least *= float((2 * share * (1 - share)).nanmean())
    if gain < least or not _gains(mapped.correct, other.correct, other.owner):
        return Finding(name, "no other order of the classes is much better")
    order = _best_order(teacher, task)
    after = match_labels(_reorder(teacher.logits, order), teacher.y, task)
    given = order if present is None else [None if c is None else order[c] for c in present]
    change = f"from {teacher.accuracy:.1%} to {after.accuracy:.1%} of {len(teacher.correct)} labels"
    text = f"another order of the classes raises it {change}"
    return Finding(name, text, f"Teacher(network, classes={given})", reason="class order")


def normalisation(
    teacher: Teacher,
    batches: Sequence[Batch],
    matched: LabeledLogits,
    task: Task,
    present: tuple[Any, Any] | None,
    to_rows: Callable[..., Any] | None = None,
) -> tuple[Finding, LabeledLogits]:
    """Check whether a poor teacher is much better with another usual normalisation.

    Fewer than 100 labeled samples are not judged.

    Args:
        teacher: The teacher.
        batches: Labeled samples, as the student sees them.
        matched: The teacher's logits of these, and the labels.
        task: Of the labels.
        present: Mean and standard deviation that the samples were normalised with. If None, they were not normalised
            and lie in [0, 1] or [0, 255].
        to_rows: See :func:`~kd_lightning.teachers.findings.collect_rows`.

    Returns:
        The finding, and the teacher's logits with the best normalisation.
    """
    name = "normalisation"
    if reason := _too_few(matched):
        return Finding(name, reason), matched
    chance, _ = _chance(matched, task)
    if chance == 1 or (matched.accuracy - chance) / (1 - chance) >= POOR:
        return Finding(name, "not checked: the teacher is good enough"), matched
    if any(batch.teacher_inputs is not None for batch in batches):
        return Finding(name, "not checked: the batches have inputs of their own for the teacher"), matched
    is_image = isinstance(batches[0].x, Tensor) and batches[0].x.ndim == 4
    if not is_image or (present is None and min(batch.x.min() for batch in batches) < 0):
        return Finding(
            name, "not checked: inputs are neither plain pixels nor normalised by a known transform"
        ), matched
    channels = batches[0].x.shape[1]
    raw = ([0.0], [1 / 255] if max(batch.x.max() for batch in batches) > 2 else [1.0])
    mean, std = (torch.tensor(list(v), dtype=torch.float64).expand(channels) for v in present or raw)
    best, best_name, best_transform = matched, "", None
    owner = matched.owner
    number = torch.arange(len(matched.correct)) if owner is None else owner
    half = number % 2 == 0  # selected on one half, tested on the other
    for other, (other_mean, other_std) in NORMALISATIONS.items():
        if len(other_mean) not in (1, channels):
            continue
        # (raw - other_mean) / other_std, from (raw - mean) / std
        shift, scale = (torch.tensor(other_mean) - mean) / std, torch.tensor(other_std) / std
        transform = v2.Normalize(shift.tolist(), scale.tolist())

        def transformed(batch: Batch, transform: Any = transform) -> Tensor:
            logits: Tensor = teacher(replace(batch, x=transform(batch.x.float()), teacher=None))  # so that it computes
            return logits

        rows = collect_rows(transformed, batches, task, to_rows)
        found = match_labels(rows.logits, rows.y, task, rows.sample)
        if found.correct[half].sum() > best.correct[half].sum():
            best, best_name, best_transform = found, other, transform
    if best_transform is None or not (
        _gains(best.correct[~half], matched.correct[~half], None if owner is None else owner[~half])
        and best.accuracy - matched.accuracy >= 0.05
    ):
        return Finding(name, "none of the usual ones makes the teacher much better"), matched
    values = {key: [float(f"{v:.5g}") for v in getattr(best_transform, key)] for key in ("mean", "std")}
    hint = f"Teacher(network, preprocess=v2.Normalize({values['mean']}, {values['std']}))"
    if teacher.has_preprocess:
        hint += " before its present preprocess"
    hint += "; in YAML preprocess: {class_path: torchvision.transforms.v2.Normalize, "
    hint += f"init_args: {{mean: {values['mean']}, std: {values['std']}}}}}"
    right = f"{best.accuracy:.1%} of {len(best.correct)} labels right"
    text = f"it was trained on inputs in {best_name}: with them {right}"
    return Finding(name, text, hint, reason="normalisation"), best


@torch.no_grad()
def eval_mode(
    teacher: Teacher, batch: Batch, outputs: Callable[[Batch], Tensor] | None = None, what: str = "logits"
) -> Finding:
    """Check that the teacher's outputs of an image depend neither on the call nor on the rest of the batch.

    Args:
        teacher: The teacher.
        batch: Some images.
        outputs: Gives the outputs (B, ...) of a batch. Default: None, which means the teacher's logits.
        what: Name of the outputs in the text.
    """
    name, compute = "eval mode", outputs or teacher
    batch = batch.select(torch.arange(min(len(batch), 8)))
    before = {key: buffer.clone() for key, buffer in teacher.network.named_buffers()}
    together = compute(batch)
    buffers = dict(teacher.network.named_buffers())
    changed = [key for key, buffer in before.items() if not torch.equal(buffer, buffers[key])]
    if changed:
        for key in changed:
            buffers[key].copy_(before[key])
        hint = "its forward pass must not change buffers in eval mode; make that depend on self.training"
        return Finding(name, f"a forward pass changes its buffers {', '.join(changed[:3])}", hint)
    if not together.isfinite().all():
        return Finding(name, f"not checked: its {what} are not finite")
    if not _is_close(compute(batch), together):
        hint = "something random ignores eval mode, such as F.dropout without training=self.training"
        return Finding(name, f"two passes give different {what} for the same images", hint)
    norms = [key for key, m in teacher.network.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    cause = f"{', '.join(norms[:3])} with track_running_stats=False" if norms else "normalisation over the batch"
    hint = f"it uses the statistics of the batch in eval mode: {cause}"
    try:
        alone = torch.cat([compute(row) for row in batch.split([1] * len(batch))])
    except (ValueError, RuntimeError) as error:  # such as BatchNorm with a single value
        if isinstance(error, InputError):
            raise
        return Finding(name, f"it cannot compute an image alone: {error}", hint)
    if not _is_close(alone.reshape(together.shape), together):
        return Finding(name, f"its {what} of an image differ alone and in a batch", hint)
    text = f"its {what} of an image are the same in two passes, alone and in a batch; no buffer changes"
    return Finding(name, text)


def soft_targets(logits: Tensor, soft_loss: nn.Module, task: Task, sample: Tensor | None = None) -> Finding:
    """Check the entropy of the soft targets at the loss's temperature, as a share of the largest possible.

    For tasks other than multiclass, each output is a Bernoulli variable. There is a warning if the 95 % interval of the
    mean lies beyond a limit, and at least 10 samples were seen.

    Args:
        logits: The teacher's logits (N, C).
        soft_loss: The loss.
        task: Of the logits.
        sample: The sample of each row, whose rows count as one. Default: None, which means that each row is a sample.
    """
    name = "soft targets"
    while isinstance(soft_loss, ConditionalLoss):
        soft_loss = soft_loss.loss
    if isinstance(soft_loss, HardDistillationLoss):
        return Finding(name, "not checked: the loss compares with the teacher's decision")
    finite = logits.isfinite().all(dim=1)
    logits, sample = logits[finite], None if sample is None else sample[finite]
    if not len(logits):
        return Finding(name, "not checked: the teacher's logits are not finite")
    temperature = temperature_of(soft_loss)
    if standardizes(soft_loss):
        logits = standardize_logits(logits)
    soft = logits.double() / temperature
    if task != "multiclass":
        soft = torch.stack([soft, torch.zeros_like(soft)], dim=-1)
    log_p = soft.log_softmax(dim=-1)
    shares = -(log_p.exp() * log_p).sum(dim=-1).reshape(len(soft), -1).mean(dim=1) / math.log(log_p.shape[-1])
    shares = mean_of_samples(shares, sample)
    share, n = float(shares.mean()), len(shares)
    low, high = mean_interval(shares)
    low, high = max(low, 0.0), min(high, 1.0)
    about = f"95% interval {low:.1%} to {high:.1%}, {n} samples"
    text = f"entropy {share:.1%} of the largest possible ({about}), at temperature {temperature:g}"
    if n < LEAST:
        return Finding(name, f"{text}; {n} samples are too few to judge")
    powers = isinstance(soft_loss, TTMLoss)  # or WTTMLoss: the temperature is 1 / exponent
    softer = "lower the exponent" if powers else "raise the temperature"
    sharper = "raise the exponent" if powers else "lower the temperature"
    if high < ONE_HOT:
        hint = f"nearly one-hot: they add little to hard targets; {softer}"
        return Finding(name, text, hint, reason="one-hot")
    if low > UNIFORM:
        return Finding(name, text, f"nearly uniform: classes hardly differ; {sharper}", reason="uniform")
    return Finding(name, text)


def _too_few(matched: LabeledLogits) -> str | None:
    """Return why a check is left out, if there are too few labels."""
    samples = matched.samples
    if samples >= FEW:
        return None
    return f"not checked: {samples} labeled samples are too few to judge" if samples else "not checked without labels"


def _decisions(matched: LabeledLogits) -> int:
    """Return the number of decisions that count as independent."""
    return len(matched.correct) if matched.sample is None else matched.samples


def _half(matched: LabeledLogits) -> Tensor:
    """Return the rows of one half of the samples, as booleans."""
    numbers = torch.arange(len(matched.y)) if matched.sample is None else torch.unique(matched.sample)
    chosen = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))[: len(numbers) // 2]]
    return torch.isin(torch.arange(len(matched.y)) if matched.sample is None else matched.sample, chosen)


def _chance(matched: LabeledLogits, task: Task) -> tuple[float, float]:
    """Accuracy of the best constant prediction, and of predictions as frequent as these that ignore the input."""
    if task == "multiclass":
        classes = matched.logits.shape[1]
        true = torch.bincount(matched.y, minlength=classes).double() / len(matched.y)
        given = torch.bincount(matched.logits.argmax(dim=1), minlength=classes).double() / len(matched.y)
        return max(float(true.max()), 1 / classes), float((true * given).sum())
    known = is_labeled(matched.y)
    number = known.sum(dim=0).double()
    true = matched.y.nan_to_num(0).sum(dim=0) / number.clamp(min=1)
    given = ((matched.logits > 0) & known).sum(dim=0) / number.clamp(min=1)
    share = number / number.sum()
    unrelated = true * given + (1 - true) * (1 - given)
    return float((share * torch.maximum(true, 1 - true)).sum()), float((share * unrelated).sum())


def _best_order(matched: LabeledLogits, task: Task) -> list[int]:
    """Class of each output in the order of the largest accuracy; ties go to the present order."""
    classes = matched.logits.shape[1]
    if task == "multiclass":
        pairs = matched.y * classes + matched.logits.argmax(dim=1)
        score = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double()
    else:
        positive, negative = (matched.y == 1).double(), (matched.y == 0).double()
        predicted = (matched.logits > 0).double()
        score = positive.T @ predicted + negative.T @ (1 - predicted)
    score += torch.eye(classes) * 0.5 / classes
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    return [int(row) for row in rows[np.argsort(columns)]]


def _reorder(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Reorder the logits (N, C) as ``Teacher(classes=...)`` does."""
    return logits[:, sorted(range(len(classes)), key=classes.__getitem__)]


def _gains(correct: Tensor, before: Tensor, owner: Tensor | None = None) -> bool:
    """Whether decisions on the same samples are better by more than 3 standard errors (as in McNemar's test).

    Args:
        correct: The decisions.
        before: Those that they are compared with.
        owner: The sample of each decision; None if they are independent.
    """
    if owner is not None:
        return is_above_zero(mean_of_samples(correct.double() - before.double(), owner))
    won, lost = int((correct & ~before).sum()), int((before & ~correct).sum())
    return won - lost > SIGMAS * math.sqrt(won + lost)


def _error(share: float, n: int) -> float:
    """3 standard errors of a share of n decisions."""
    return SIGMAS * math.sqrt(share * (1 - share) / n)


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether logits are equal up to rounding, which depends on the size of a batch."""
    tolerance = 5e-2 if one.dtype in (torch.float16, torch.bfloat16) else 5e-3
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
