"""What every loss between logits and class labels shares: checks, log-probabilities, and losses row by row."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError


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
        rows: Tensor = loss(logits, target, **{name: told[name] for name in told_names(loss) if name in told})
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


def told_names(loss: nn.Module) -> list[str]:
    """Which of ``kind`` and ``index`` a loss wants to be told of its rows."""
    parameters = inspect.signature(loss.forward).parameters
    return [name for name in ("kind", "index") if name in parameters]
