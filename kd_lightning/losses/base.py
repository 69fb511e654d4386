"""What every loss between logits and class labels shares: checks, log-probabilities, and losses row by row."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import InputError

Task = Literal["multiclass", "multilabel", "binary"]
Reduction = Literal["mean", "none"]


def check_task(task: str) -> None:
    """Raise InputError unless ``task`` is one of the three."""
    if task not in get_args(Task):
        raise InputError(f"task must be one of {get_args(Task)}, got {task!r}")


def check_reduction(reduction: str) -> None:
    """Raise InputError unless ``reduction`` is "mean" or "none"."""
    if reduction not in get_args(Reduction):
        raise InputError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")


def check_temperature(temperature: float) -> None:
    """Raise InputError unless ``temperature`` is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be finite and above 0, got {temperature}")


def check_weight(name: str, weight: float) -> None:
    """Raise InputError unless ``weight`` is finite and not negative."""
    if not 0 <= weight < math.inf:
        raise InputError(f"{name} must be finite and at least 0, got {weight}")


def pair_logits(student_logits: Tensor, teacher_logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Check both sides' shapes and return them as (B, C), in at least float32.

    Args:
        student_logits: (B, C), C >= 2, for multiclass; (B, L) for multilabel; (B,) or (B, 1) for binary.
        teacher_logits: As the student's; for binary either of the two shapes.
        task: What the logits mean.

    Returns:
        Student's and teacher's logits: half precision becomes float32, float64 stays, binary becomes (B, 1).

    Raises:
        InputError: The shapes differ, or don't fit the task.
    """
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if task == "binary":
        if any(not shape or shape[1:] not in ((), (1,)) for shape in shapes):
            raise InputError("binary logits must be (B,) or (B, 1), got student {} and teacher {}".format(*shapes))
        student_logits, teacher_logits = student_logits.reshape(-1, 1), teacher_logits.reshape(-1, 1)
    if student_logits.shape != teacher_logits.shape:
        raise InputError("student and teacher logits must have one shape, got {} and {}".format(*shapes))
    if student_logits.ndim != 2:
        raise InputError(f"{task} logits must have 2 dimensions (batch, classes), got shape {shapes[0]}")
    if task == "multiclass" and student_logits.shape[1] < 2:
        raise InputError(f"multiclass logits need at least 2 classes, got shape {shapes[0]}; is the task binary?")
    return _upcast(student_logits), _upcast(teacher_logits)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def standardize_logits(logits: Tensor) -> Tensor:
    """Give every row of (B, C) logits mean 0 and (unbiased) standard deviation 1; constant rows become 0."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    std = logits.std(dim=1, keepdim=True)
    # Rows constant to rounding aren't scaled: gradients of 1e7 would throw the student far off and overflow float16.
    constant = std <= 4 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1, keepdim=True)
    return centred / (1e-7 + std).masked_fill(constant, 1)


def kl_divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, summed over the last dimension."""
    return F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(dim=-1)


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Return (B,) values as they are ("none") or their mean; the mean of no rows is 0, in the graph."""
    return rows if reduction == "none" else rows.sum() / max(len(rows), 1)


def check_target(logits: Tensor, target: Tensor, count: int | None = None) -> None:
    """Refuse logits that are not (B, C), and a target that is not (B,) integers below ``count`` (None: C).

    Raises:
        InputError: The message says what came.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.is_floating_point():
        raise InputError(
            f"a hard loss takes logits (B, C) and class indices (B,), got {[*logits.shape]} and {[*target.shape]} "
            f"of {target.dtype}"
        )
    count = logits.shape[1] if count is None else count
    # elsewhere than on the CPU to look would be to wait for the device
    if target.device.type == "cpu" and (bad := target[(target < 0) | (target >= count)]).numel():
        raise InputError(f"target must be 0 ... {count - 1}, got {bad[0].item()}")


def log_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities (B, C) of logits (B, C) in at least float32, once the target (B,) fits them.

    Raises:
        InputError: See :func:`check_target`.
    """
    check_target(logits, target)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)


def pick(values: Tensor, target: Tensor) -> Tensor:
    """The entry (B,) of each row of (B, C) that its target names."""
    return values.gather(1, target.long().unsqueeze(1)).squeeze(1)


def check_transition(matrix: Sequence[Sequence[float]], name: str = "matrix") -> Tensor:
    """A transition matrix as a float64 tensor (C, C).

    Raises:
        InputError: Unless it is square, of probabilities, and each row sums to 1; the message names the row.
    """
    try:
        rows = [list(map(float, row)) for row in matrix]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be rows of numbers, got {matrix!r}") from error
    for number, row in enumerate(rows):
        if len(row) != len(rows):
            raise InputError(f"{name} must be square, but row {number} of {len(rows)} has {len(row)} entries")
        if not all(0.0 <= value <= 1.0 for value in row):
            raise InputError(f"{name}: row {number} must hold probabilities in [0, 1], got {row}")
        if not math.isclose(total := math.fsum(row), 1.0, abs_tol=1e-6):
            raise InputError(f"{name}: row {number} must sum to 1, got {total:g}")
    if len(rows) < 2:
        raise InputError(f"{name} must have at least 2 classes, got {len(rows)}")
    return torch.tensor(rows, dtype=torch.float64)


def check_reducible(name: str, loss: nn.Module) -> None:
    """Raise InputError unless a loss has a ``reduction``, as torch's have."""
    if not isinstance(getattr(loss, "reduction", None), str):
        raise InputError(f"{name}: {type(loss).__name__} has no reduction, which must be 'none' to weight or sort rows")


def per_row(loss: nn.Module, logits: Tensor, target: Tensor, **told: Any) -> Tensor:
    """The loss of each row, (B,), whatever reduction the loss was made with.

    Args:
        loss: One with a ``reduction``.
        logits: (B, C).
        target: (B,).
        told: What more it may be told of the rows, by name; what its forward does not take is left out.
    """
    check_reducible("hard_loss", loss)
    before: Any = loss.reduction
    loss.reduction = "none"  # type: ignore[assignment]
    try:
        rows: Tensor = loss(logits, target, **{name: told[name] for name in row_fields_of(loss) if name in told})
    finally:
        loss.reduction = before
    return rows


def mean_loss(loss: nn.Module, logits: Tensor, target: Tensor, weight: Tensor | None = None, **told: Any) -> Tensor:
    """The mean of a loss over rows, a scalar, whether the loss was made to give the mean or each row's.

    Args:
        loss: Any, called as ``(logits, target)``; with ``weight``, one with a ``reduction``.
        logits: (B, C).
        target: (B,).
        weight: What each row's loss is multiplied by, (B,). With class weights the sum is divided by theirs, as torch
            does it, not by the number of rows.
        told: See :func:`per_row`.
    """
    if weight is None and getattr(loss, "reduction", None) != "none":
        mean: Tensor = loss(logits, target, **told)
        return mean
    rows = per_row(loss, logits, target, **told)
    rows = rows if weight is None else rows * weight
    by_class = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and loss.weight is not None
    return rows.sum() / (loss.weight[target].sum() if by_class and len(target) else max(len(target), 1))  # type: ignore[index]


def row_fields_of(loss: nn.Module) -> list[str]:
    """Which of ``kind`` and ``index`` a loss wants to be told of its rows."""
    parameters = inspect.signature(loss.forward).parameters
    return [name for name in ("kind", "index") if name in parameters]


def to_probabilities(logits: Tensor, task: Task) -> Tensor:
    """Probabilities: (B, C) that sum to one over classes, (B, L) one for each label, or (B,) of the binary task."""
    logits = logits.detach().float()
    if task == "multiclass":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if task == "multilabel" else logits.sigmoid().flatten()


def decide(logits: Tensor, task: Task) -> Tensor:
    """The decision as torchmetrics takes targets: (B,) classes, or zeros and ones."""
    probabilities = to_probabilities(logits, task)
    return probabilities.argmax(dim=-1) if task == "multiclass" else (probabilities > 0.5).long()
