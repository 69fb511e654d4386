"""What the losses share: checks of arguments and shapes, probabilities, and reductions."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.protocols import row_fields_of

Task = Literal["multiclass", "multilabel", "binary", "regression"]
Reduction = Literal["mean", "none"]


# Checks of arguments.


def check_task(task: str) -> None:
    """Raise InputError unless ``task`` is one of logits: "multiclass", "multilabel" or "binary"."""
    if task not in (allowed := get_args(Task)[:3]):
        raise InputError(f"task must be one of {allowed}, got {task!r}")


def check_reduction(reduction: str) -> None:
    """Raise InputError unless ``reduction`` is "mean" or "none"."""
    if reduction not in get_args(Reduction):
        raise InputError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise InputError unless ``temperature`` is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise InputError(f"{name} must be finite and above 0, got {temperature}")


def check_weight(name: str, weight: float) -> None:
    """Raise InputError unless ``weight`` is finite and at least 0."""
    if not 0 <= weight < math.inf:
        raise InputError(f"{name} must be finite and at least 0, got {weight}")


def check_transition(matrix: Sequence[Sequence[float]], name: str = "matrix") -> Tensor:
    """Convert a transition matrix to a float64 tensor (C, C).

    Raises:
        InputError: If the matrix is not square, an entry is not in [0, 1], or a row does not sum to 1. The message
            has the number of the row.
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


# Checks of shapes.


def pair_logits(student_logits: Tensor, teacher_logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Check the shapes of both logits and return them as (B, C), in at least float32.

    Args:
        student_logits: (B, C), C >= 2, for multiclass; (B, L) for multilabel; (B,) or (B, 1) for binary.
        teacher_logits: The same shape as the student's. For binary, either of the two shapes.
        task: What the logits mean.

    Returns:
        The student's and the teacher's logits. Half precision becomes float32, float64 stays, binary becomes (B, 1).

    Raises:
        InputError: If the shapes differ or do not fit the task.
    """
    student, teacher = student_logits, teacher_logits
    shape, other = student.shape, teacher.shape
    if task == "binary":
        if any(not of or of[1:] not in ((), (1,)) for of in (shape, other)):
            shapes = f"student {tuple(shape)} and teacher {tuple(other)}"
            raise InputError(f"binary logits must be (B,) or (B, 1), got {shapes}")
        student, teacher = student.reshape(-1, 1), teacher.reshape(-1, 1)
    if student.shape != teacher.shape:
        raise InputError(f"student and teacher logits must have one shape, got {tuple(shape)} and {tuple(other)}")
    if student.ndim != 2:
        raise InputError(f"{task} logits must have 2 dimensions (batch, classes), got shape {tuple(shape)}")
    if task == "multiclass" and shape[1] < 2:
        raise InputError(f"multiclass logits need at least 2 classes, got shape {tuple(shape)}; is the task binary?")
    return at_least_float32(student), at_least_float32(teacher)


def check_target(logits: Tensor, target: Tensor, count: int | None = None) -> None:
    """Check that logits are (B, C) and that the target is (B,) integers in 0 ... ``count - 1``.

    On other devices than the CPU the values of the target are not checked, since that would synchronise.

    Args:
        logits: (B, C).
        target: (B,).
        count: How many values the target may take. Default: None, which means C.

    Raises:
        InputError: If they do not fit.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.is_floating_point():
        raise InputError(
            f"a hard loss takes logits (B, C) and class indices (B,), got {[*logits.shape]} and {[*target.shape]} "
            f"of {target.dtype}"
        )
    count = logits.shape[1] if count is None else count
    if target.device.type == "cpu" and (bad := target[(target < 0) | (target >= count)]).numel():
        raise InputError(f"target must be 0 ... {count - 1}, got {bad[0].item()}")


# Logits and probabilities.


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert half precision to float32; float64 stays."""
    if logits.dtype in (torch.float32, torch.float64):
        return logits  # to() takes longer than this comparison
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def standardize_logits(logits: Tensor) -> Tensor:
    """Give each row of (B, C) logits mean 0 and (unbiased) standard deviation 1; constant rows become 0."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    std = logits.std(dim=1, keepdim=True)
    # Rows that are constant to rounding are not scaled: gradients of 1e7 would overflow float16.
    constant = std <= 4 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1, keepdim=True)
    return centred / (1e-7 + std).masked_fill(constant, 1)


def log_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Check a target (B,) against logits (B, C), and return the log-probabilities (B, C) in at least float32.

    Raises:
        InputError: See :func:`check_target`.
    """
    check_target(logits, target)
    return at_least_float32(logits).log_softmax(dim=1)


def gather_target(values: Tensor, target: Tensor) -> Tensor:
    """Return the entry (B,) of each row of (B, C) at the row's target."""
    return values.gather(1, target.long().unsqueeze(1)).squeeze(1)


def kl_terms(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """Terms of KL(teacher || student) of log-probabilities, in their shape."""
    return teacher_log.exp() * (teacher_log - student_log)  # as F.kl_div, but in less time


def kl_divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, summed over the last dimension."""
    return kl_terms(student_log, teacher_log).sum(dim=-1)


def to_probabilities(logits: Tensor, task: Task) -> Tensor:
    """Convert logits to probabilities: (B, C) that sum to 1 for multiclass, (B, L) for multilabel, (B,) for binary.

    Values of the regression task stay as they are.
    """
    logits = logits.detach().float()
    if task == "regression":
        return logits
    if task == "multiclass":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if task == "multilabel" else logits.sigmoid().flatten()


def predicted_labels(logits: Tensor, task: Task) -> Tensor:
    """Return the predicted labels in the form of torchmetrics' targets: classes (B,), zeros and ones, or values."""
    probabilities = to_probabilities(logits, task)
    if task == "regression":
        return probabilities
    return probabilities.argmax(dim=-1) if task == "multiclass" else (probabilities > 0.5).long()


# Reductions.


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Return (B,) values unchanged ("none") or their mean; the mean of no rows is 0, in the graph."""
    return rows if reduction == "none" else rows.sum() / max(rows.shape[0], 1)


def check_reducible(name: str, loss: nn.Module) -> None:
    """Raise InputError unless a loss has an attribute ``reduction``, as torch's losses have."""
    if not isinstance(getattr(loss, "reduction", None), str):
        raise InputError(
            f"{name}: {type(loss).__name__} has no reduction, which must be 'none' to weight or sort rows, or to leave "
            "out missing labels of a row"
        )


def per_row(loss: nn.Module, logits: Tensor, target: Tensor, **fields: Any) -> Tensor:
    """Return the loss of each row, (B,), whatever the reduction of the loss is.

    Args:
        loss: A loss with a ``reduction``.
        logits: (B, C).
        target: (B,). If it is (B, L), a loss may return one value for each label, (B, L).
        fields: Row fields by name. Those that the loss does not declare are left out.

    Raises:
        InputError: If the loss has no ``reduction``, or returns no value for each row.
    """
    check_reducible("hard_loss", loss)
    _convert_weight(loss, logits)
    before: Any = loss.reduction
    loss.reduction = "none"  # type: ignore[assignment]
    try:
        rows: Tensor = loss(logits, target, **{name: fields[name] for name in row_fields_of(loss) if name in fields})
    finally:
        loss.reduction = before
    if rows.shape[:1] != target.shape[:1]:
        raise InputError(
            f"hard_loss: {type(loss).__name__} with reduction 'none' must return one value for each row, "
            f"[{len(target)}], got {[*rows.shape]}"
        )
    return rows


def _convert_weight(loss: nn.Module, logits: Tensor) -> None:
    """Convert the class weights of torch's losses to the logits' type, as from half precision of "bf16-true"."""
    weight, dtype = getattr(loss, "weight", None), torch.promote_types(logits.dtype, torch.float32)
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and weight is not None and weight.dtype != dtype:
        loss.weight = weight.to(dtype)


def class_weights(loss: nn.Module, target: Tensor) -> Tensor | None:
    """Return the class weight of each row, (B,), if the loss is one of torch's that divide by their sum.

    These are ``CrossEntropyLoss`` and ``NLLLoss`` with a ``weight``, or with an ``ignore_index`` that is a class, whose
    weight is 0. For any other loss return None.

    Args:
        loss: A hard loss.
        target: (B,) class indices, or (B, C) probabilities, for which torch does not divide by weights.
    """
    if target.is_floating_point():
        return None
    # a subclass with a forward of its own may divide by anything
    if getattr(type(loss), "forward", None) not in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward):
        return None
    weight: Any = loss.weight
    ignored: Any = loss.ignore_index
    if weight is None and ignored < 0:
        return None
    weights: Tensor = torch.ones(len(target), device=target.device) if weight is None else weight[target]
    return weights.masked_fill(target == ignored, 0)


def mean_loss(loss: nn.Module, logits: Tensor, target: Tensor, weight: Tensor | None = None, **fields: Any) -> Tensor:
    """Return the mean of a loss over rows, a scalar, whether its reduction is "mean" or "none".

    Args:
        loss: A loss, called as ``(logits, target)``. With ``weight`` it must have a ``reduction``.
        logits: (B, C).
        target: (B,), or (B, L).
        weight: Factor of each row's loss, (B,). If the loss has class weights (see :func:`class_weights`), the sum is
            divided by their sum, as torch does, and not by the number of rows; if their sum is 0, the mean is 0.
            Default: None, which means 1.
        fields: The row fields that the loss declares, by name.
    """
    _convert_weight(loss, logits)
    by_class = class_weights(loss, target)
    if weight is None and by_class is None and getattr(loss, "reduction", None) != "none":
        mean: Tensor = loss(logits, target, **fields)
        return mean
    rows = per_row(loss, logits, target, **fields)
    rows = rows if weight is None else rows * weight.view(-1, *[1] * (rows.ndim - 1))
    if by_class is None:
        return rows.sum() / max(rows.numel(), 1)
    total = by_class.sum()
    return rows.sum() / torch.where(total > 0, total, 1)


def mean_of_known(
    loss: nn.Module, logits: Tensor, target: Tensor, known: Tensor, weight: Tensor | None = None, **fields: Any
) -> Tensor:
    """Return the mean of a loss over the known labels of whole rows, a scalar.

    The loss gets whole rows, so that its parameters of each label (such as ``pos_weight``) meet their label. Missing
    labels are replaced by 0, and their logits, too. Their values are left out, and their logits get no gradient.

    Args:
        loss: A loss with a ``reduction``, that returns one value for each label if this is "none".
        logits: (B, L).
        target: (B, L), any value where the label is missing.
        known: Which labels are known, (B, L) booleans; at least one.
        weight: Factor of each row's loss, (B,). Default: None, which means 1.
        fields: The row fields that the loss declares, by name.

    Raises:
        InputError: If the loss has no ``reduction``, or returns no value for each label.
    """
    values = per_row(loss, logits.masked_fill(~known, 0), target.masked_fill(~known, 0), **fields)
    if values.shape != target.shape:
        raise InputError(
            f"hard_loss: {type(loss).__name__} with reduction 'none' must return one value for each label, "
            f"{[*target.shape]}, where labels of a row are missing, got {[*values.shape]}"
        )
    values = values if weight is None else values * weight.unsqueeze(1)
    return values.masked_fill(~known, 0).sum() / known.sum()
