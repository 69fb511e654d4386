"""Is this teacher any good on this data? Checks before a training; each returns one finding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import v2

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, standardize_logits
from kd_lightning.teachers.teacher import Teacher

SIGMAS = 3.0  # standard errors that make a difference
ONE_HOT, UNIFORM = 0.01, 0.995  # Hinton's digits at T = 20 are at about 0.98
NEGLIGIBLE = 100.0  # ratio of two gradients
POOR = 0.75  # share of the way from chance to perfect
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
"""Mean and standard deviation, of pixels in [0, 1], that networks are usually trained with."""


class Finding(NamedTuple):
    """What a check found: a line, what to do where something is wrong, and whether the run is pointless so."""

    name: str
    text: str
    hint: str | None = None
    pointless: bool = False


class Judged(NamedTuple):
    """A network's answers beside the labels."""

    logits: Tensor  # (N, C); (N, 1) for the binary task
    y: Tensor  # (N,) class indices, or (N, L) of zeros and ones, NaN where missing
    right: Tensor  # a boolean for each known label

    @property
    def accuracy(self) -> float:
        """Share of right decisions."""
        return float(self.right.double().mean())


@torch.no_grad()
def answers(answer: Callable[[Batch], Tensor], batches: Sequence[Batch], task: Task) -> Tensor:
    """Logits (N, C) of all samples, on the CPU in at least float32."""
    try:
        logits = torch.cat([answer(batch).cpu() for batch in batches])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"a network cannot take inputs of shape {[*batches[0].x.shape]}: {reason}") from error
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if task == "multiclass" else logits.reshape(len(logits), -1)


def judge(logits: Tensor, y: Tensor | None, task: Task) -> Judged:
    """Set logits (N, C) beside labels; samples without any label are left out.

    Raises:
        InputError: For labels that do not fit the logits.
    """
    if y is None:
        return Judged(logits[:0], torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    y = y.cpu() if task == "multiclass" else y.cpu().reshape(len(y), -1)
    if logits.ndim != 2 or y.shape != logits.shape[: y.ndim] or (y.ndim == 1) != (task == "multiclass"):
        raise InputError(f"{task} labels of shape {[*y.shape]} do not fit logits of shape {[*logits.shape]}")
    known = is_labeled(y)
    if task == "multiclass":
        logits, y = logits[known], y[known].long()
        if len(y) and not 0 <= y.min() <= y.max() < logits.shape[1]:
            raise InputError(f"labels must be 0 ... {logits.shape[1] - 1}, got {y.min()} ... {y.max()}")
        return Judged(logits, y, logits.argmax(dim=1) == y)
    rows = known.any(dim=1)
    logits, y, known = logits[rows], y[rows].double().masked_fill(~known[rows], math.nan), known[rows]
    return Judged(logits, y, ((logits > 0) == (y > 0.5))[known])


def accuracy(teacher: Judged, student: Judged | None, task: Task, what: str) -> Finding:
    """The teacher against chance and against the student as it stands, on ``what``.

    Chance is the best constant answer. A teacher is pointless if it does not surpass that, and agrees with the labels
    no more often than answers as frequent as its own would that have nothing to do with them (Cohen's kappa is 0).
    Both within 3 standard errors.
    """
    n = len(teacher.right)
    if not n:
        return Finding("teacher", f"no {what} to judge it by")
    if not teacher.logits.isfinite().all():
        rows = int((~teacher.logits.isfinite()).any(dim=1).sum())
        text = f"its logits are not finite for {rows} of {len(teacher.logits)} samples"
        return Finding("teacher", text, "check its weights, and whether its inputs are finite", pointless=True)
    constant, unrelated = _chance(teacher, task)
    against = "" if student is None else f", student as it stands {student.accuracy:.1%}"
    text = f"{teacher.accuracy:.1%} of {n} {what} right (chance {constant:.1%}{against})"
    if constant + _error(constant, n) >= 1:
        return Finding("teacher", f"{text}; too few labels to tell it from chance")
    if teacher.accuracy <= constant + _error(constant, n):
        if teacher.accuracy <= unrelated + _error(unrelated, n):
            hint = "it knows nothing of this data: is it trained, are weights, class order and inputs the right ones?"
            return Finding("teacher", text, hint, pointless=True)
        return Finding("teacher", text, "a constant answer would be right as often; check how it was trained")
    if student is not None and _gains(student.right, teacher.right):
        return Finding("teacher", text, "the student is better already; find a better teacher, or lower soft_weight")
    return Finding("teacher", text)


def class_order(teacher: Judged, task: Task, present: Sequence[int] | None = None) -> Finding:
    """Whether another order of the classes would raise the accuracy sharply; ``present`` is the teacher's ``classes``.

    The order is found on one half of the samples and judged on the other, so that many classes and few samples do not
    fake a gain.
    """
    name = "class order"
    if not len(teacher.right):
        return Finding(name, "not checked without labels")
    if task == "binary":
        _, unrelated = _chance(teacher, task)
        if teacher.accuracy >= unrelated - _error(unrelated, len(teacher.right)):
            return Finding(name, "its yes is the labels' yes")
        text = f"its yes is the labels' no: turned round it has {1 - teacher.accuracy:.1%} right"
        return Finding(name, text, "negate weight and bias of its last layer, or swap 0 and 1 in the labels")

    first = torch.zeros(len(teacher.y), dtype=torch.bool)
    first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))[: len(first) // 2]] = True
    other = judge(teacher.logits[~first], teacher.y[~first], task)
    order = _best_order(judge(teacher.logits[first], teacher.y[first], task), task)
    mapped = judge(_reorder(other.logits, order), other.y, task)
    gain = mapped.accuracy - other.accuracy
    # two swapped classes of C cost 2/C of the accuracy: less than a quarter of that is confusion, no order
    least = 0.5 / teacher.logits.shape[1]
    if task == "multilabel":
        share = teacher.y.nanmean(dim=0)
        least *= float((2 * share * (1 - share)).nanmean())
    if gain < least or not _gains(mapped.right, other.right):
        return Finding(name, "no other order of the classes is much better")
    order = _best_order(teacher, task)
    after = judge(_reorder(teacher.logits, order), teacher.y, task)
    classes = order if present is None else [order[student_class] for student_class in present]
    text = f"another order of the classes raises it from {teacher.accuracy:.1%} to {after.accuracy:.1%}"
    return Finding(name, text, f"Teacher(network, classes={classes})")


def normalisation(
    teacher: Teacher, batches: Sequence[Batch], judged: Judged, task: Task, present: tuple[Any, Any] | None
) -> tuple[Finding, Judged]:
    """Whether a poor teacher does much better under another of the usual normalisations.

    Args:
        teacher: The teacher.
        batches: Labeled samples, as the student sees them.
        judged: The teacher on these.
        task: Of the labels.
        present: Mean and std with which the samples were normalised; None: not at all, and [0, 1] or [0, 255].

    Returns:
        The finding, and the teacher's answers under what serves it best.
    """
    name = "normalisation"
    if not len(judged.right):
        return Finding(name, "not checked without labels"), judged
    chance, _ = _chance(judged, task)
    if chance == 1 or (judged.accuracy - chance) / (1 - chance) >= POOR:
        return Finding(name, "not in question"), judged
    if batches[0].x.ndim != 4 or (present is None and min(batch.x.min() for batch in batches) < 0):
        return Finding(name, "not checked: the inputs are no plain pixels, nor normalised where it can be seen"), judged
    channels = batches[0].x.shape[1]
    raw = ([0.0], [1 / 255] if max(batch.x.max() for batch in batches) > 2 else [1.0])
    mean, std = (torch.tensor(list(v), dtype=torch.float64).expand(channels) for v in present or raw)
    y = torch.cat([batch.y for batch in batches if batch.y is not None])
    best, best_name, best_transform = judged, "", None
    half = torch.arange(len(judged.right)) % 2 == 0  # chosen on one half, judged on the other
    for other, (other_mean, other_std) in NORMALISATIONS.items():
        if len(other_mean) not in (1, channels):
            continue
        # (raw - other_mean) / other_std, from (raw - mean) / std
        shift, scale = (torch.tensor(other_mean) - mean) / std, torch.tensor(other_std) / std
        transform = v2.Normalize(shift.tolist(), scale.tolist())
        # without index, by which a teacher might look its outputs up
        logits = answers(lambda batch, f=transform: teacher(Batch(f(batch.x.float()))), batches, task)  # type: ignore[misc]
        found = judge(logits, y, task)
        if found.right[half].sum() > best.right[half].sum():
            best, best_name, best_transform = found, other, transform
    if best_transform is None or not (
        _gains(best.right[~half], judged.right[~half]) and best.accuracy - judged.accuracy >= 0.05
    ):
        return Finding(name, "none of the usual ones makes the teacher much better"), judged
    values = {key: [float(f"{v:.5g}") for v in getattr(best_transform, key)] for key in ("mean", "std")}
    hint = f"Teacher(network, preprocess=v2.Normalize({values['mean']}, {values['std']}))"
    if len(teacher._hidden) > 1:
        hint += " before what it has for preprocess"
    hint += "; in YAML preprocess: {class_path: torchvision.transforms.v2.Normalize, "
    hint += f"init_args: {{mean: {values['mean']}, std: {values['std']}}}}}"
    return Finding(name, f"made for inputs in {best_name}: with them {best.accuracy:.1%} right", hint), best


@torch.no_grad()
def eval_mode(teacher: Teacher, batch: Batch) -> Finding:
    """Whether the teacher answers an image the same way whenever it comes, and whatever it comes with."""
    name = "eval mode"
    batch = Batch(batch.x[:8])
    before = {key: buffer.clone() for key, buffer in teacher.network.named_buffers()}
    together = teacher(batch)
    buffers = dict(teacher.network.named_buffers())
    changed = [key for key, buffer in before.items() if not torch.equal(buffer, buffers[key])]
    if changed:
        for key in changed:
            buffers[key].copy_(before[key])
        hint = "it is no frozen teacher: its forward must change nothing unless self.training"
        return Finding(name, f"a forward pass changes its buffers {', '.join(changed[:3])}", hint)
    if not together.isfinite().all():
        return Finding(name, "not checked: its logits are not finite")
    if not _is_close(teacher(batch), together):
        hint = "something random ignores eval mode, such as F.dropout without training=self.training"
        return Finding(name, "asked twice, it answers the same images differently", hint)
    norms = [key for key, m in teacher.network.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    cause = f"{', '.join(norms[:3])} with track_running_stats=False" if norms else "normalisation over the batch"
    hint = f"it uses the statistics of the batch in eval mode: {cause}"
    try:
        alone = torch.cat([teacher(Batch(row)) for row in batch.x.unsqueeze(1)])
    except (ValueError, RuntimeError) as error:  # such as batch norm that has one value to take statistics of
        if isinstance(error, InputError):
            raise
        return Finding(name, f"it cannot answer an image alone: {error}", hint)
    if not _is_close(alone.reshape(together.shape), together):
        return Finding(name, "it answers an image differently alone and in a batch", hint)
    return Finding(name, "it answers an image the same way twice, alone and in a batch, and changes nothing in itself")


def soft_targets(logits: Tensor, soft_loss: nn.Module, task: Task) -> Finding:
    """Entropy of the soft targets at the loss's temperature, over the largest possible; Bernoulli unless multiclass."""
    name = "soft targets"
    logits = logits[logits.isfinite().all(dim=1)]
    if not len(logits):
        return Finding(name, "not checked: the teacher's logits are not finite")
    temperature = float(getattr(soft_loss, "temperature", 1.0))
    if getattr(soft_loss, "standardize", False):
        logits = standardize_logits(logits)
    soft = logits.double() / temperature
    if task != "multiclass":
        soft = torch.stack([soft, torch.zeros_like(soft)], dim=-1)
    log_p = soft.log_softmax(dim=-1)
    share = float(-(log_p.exp() * log_p).sum(dim=-1).mean()) / math.log(log_p.shape[-1])
    text = f"entropy {share:.1%} of the largest possible, at temperature {temperature:g}"
    if share < ONE_HOT:
        return Finding(name, text, "nearly one-hot: they tell little more than hard targets; raise the temperature")
    if share > UNIFORM:
        return Finding(name, text, "nearly uniform: they hardly tell the classes apart; lower the temperature")
    return Finding(name, text)


def gradients(terms: Mapping[str, tuple[float, Tensor]], student: nn.Module, *, labeled: bool = True) -> Finding:
    """Gradient norms on the student of the weighted terms of the objective.

    Args:
        terms: ``{name: (weight, value)}``, as a module's ``losses(batch)`` gives them.
        student: The network that shall learn.
        labeled: Whether the batch has labels; without, a term may rightly be 0.
    """
    name = "gradients"
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        return Finding(name, "no parameter of the student requires one", "let its parameters train", pointless=True)
    norms = {}
    for term, (weight, value) in terms.items():
        found: Sequence[Tensor | None] = []
        if value.requires_grad:
            found = torch.autograd.grad(weight * value, parameters, retain_graph=True, allow_unused=True)
        norms[term] = math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))
    each = (f"{term} {norm:.3g} (weight {terms[term][0]:.3g})" for term, norm in norms.items())
    text = f"norms on the student: {', '.join(each)}"
    counted = {term: norm for term, norm in norms.items() if terms[term][0] != 0}
    bad = [term for term, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        return Finding(name, text, f"{' and '.join(bad)}: not finite; nothing can be learned", pointless=True)
    if not any(norms.values()):
        hint = "the student gets no gradient: are its layers detached, dead, or its last weights 0?"
        return Finding(name, text, hint, pointless=True)
    if len(counted) < 2:
        return Finding(name, text)
    weak, strong = min(counted, key=counted.__getitem__), max(counted, key=counted.__getitem__)
    if counted[weak] == 0:
        hint = f"{weak} gives none: does its loss depend on the student, or has the student nothing to learn from it?"
        return Finding(name, text, hint if labeled else None)
    ratio = counted[strong] / counted[weak]
    text += f"; {strong} {ratio:.3g} times {weak}"
    hint = f"{weak} is negligible beside {strong}: change their weights or rescale a loss"
    return Finding(name, text, hint if ratio >= NEGLIGIBLE else None)


def labels(y: Tensor | None, count: int, classes: int, task: Task, what: str, *, taught: bool) -> Finding:
    """How many samples have labels that training may see, and of how many classes; a teacher does without any."""
    known = torch.zeros(count, dtype=torch.bool) if y is None else is_labeled(y).reshape(len(y), -1).any(dim=1)
    text = f"{int(known.sum())} of {len(known)} {what} labeled"
    if y is None or not known.any():
        return Finding("labels", text, None if taught else "there is nothing to learn from", pointless=not taught)
    if task == "multiclass":
        text += f", {len(torch.unique(y[known]))} of {classes} classes"
    return Finding("labels", text)


def _chance(judged: Judged, task: Task) -> tuple[float, float]:
    """Accuracy of the best constant answer, and of answers as frequent as these that ignore the input."""
    if task == "multiclass":
        classes = judged.logits.shape[1]
        true = torch.bincount(judged.y, minlength=classes).double() / len(judged.y)
        given = torch.bincount(judged.logits.argmax(dim=1), minlength=classes).double() / len(judged.y)
        return max(float(true.max()), 1 / classes), float((true * given).sum())
    known = is_labeled(judged.y)
    number = known.sum(dim=0).double()
    true = judged.y.nan_to_num(0).sum(dim=0) / number.clamp(min=1)
    given = ((judged.logits > 0) & known).sum(dim=0) / number.clamp(min=1)
    share = number / number.sum()
    unrelated = true * given + (1 - true) * (1 - given)
    return float((share * torch.maximum(true, 1 - true)).sum()), float((share * unrelated).sum())


def _best_order(judged: Judged, task: Task) -> list[int]:
    """For each output the class that it stands for best, all in all; its own where nothing speaks against it."""
    classes = judged.logits.shape[1]
    if task == "multiclass":
        pairs = judged.y * classes + judged.logits.argmax(dim=1)
        score = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double()
    else:
        yes, no, said = (judged.y == 1).double(), (judged.y == 0).double(), (judged.logits > 0).double()
        score = yes.T @ said + no.T @ (1 - said)
    score += torch.eye(classes) * 0.5 / classes
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    return [int(row) for row in rows[np.argsort(columns)]]


def _reorder(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """As Teacher(classes=...) does."""
    return logits[:, sorted(range(len(classes)), key=classes.__getitem__)]


def _gains(right: Tensor, before: Tensor) -> bool:
    """Whether decisions on the same samples are better by more than 3 standard errors (as McNemar's test)."""
    won, lost = int((right & ~before).sum()), int((before & ~right).sum())
    return won - lost > SIGMAS * math.sqrt(won + lost)


def _error(share: float, n: int) -> float:
    return SIGMAS * math.sqrt(share * (1 - share) / n)


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, which differs with the size of a batch."""
    tolerance = 5e-2 if one.dtype in (torch.float16, torch.bfloat16) else 5e-3
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def of_teacher(finding: Finding, name: str) -> Finding:
    """A finding that says which teacher it is of."""
    return finding._replace(name=name if finding.name == "teacher" else f"{name}, {finding.name}")
