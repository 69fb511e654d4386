"""The hard loss of a batch: the mean over its known labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, at_least_float32, class_weights, mean_loss, mean_of_known
from kd_lightning.losses.coarse import coarse_rows
from kd_lightning.losses.protocols import is_own, is_stateful, row_fields_of, row_values


class HardLoss(NamedTuple):
    """The hard loss of a batch.

    Attributes:
        value: The mean over the known labels, coarse ones included: a scalar. Without labels it is 0, in the graph.
        labels: The number of these labels.
        class_weights: The sum of their class weights, a scalar, by which the sum was divided; a coarse label weighs 1.
            None if the loss has no class weights: then the sum was divided by ``labels``.
    """

    value: Tensor
    labels: int
    class_weights: Tensor | None


def hard_loss_of(loss: nn.Module, task: Task, logits: Tensor, batch: Batch) -> HardLoss:
    """Compute the hard loss of a batch.

    Args:
        loss: The hard loss. A project's own one gets labels that do not fit the task as they are, with the outputs of
            all rows that have a label.
        task: The module's task.
        logits: (B, C), or (B,) or (B, 1) for the binary task. Of the regression task values (B, D), or (B,).
        batch: The batch.

    Raises:
        InputError: If labels, weights or coarse labels do not fit the logits or the task.
    """
    logits = at_least_float32(logits)
    fine = _fine(loss, task, logits, batch)
    if batch.candidates is None or not len(batch):
        return fine
    value, labels, weights = fine
    coarse = batch.candidates.any(dim=1)
    if task != "multiclass" or batch.candidates.shape != logits.shape:
        shapes = f"{[*batch.candidates.shape]} do not fit logits of shape {[*logits.shape]}"
        raise InputError(f"coarse labels are for the multiclass task; {task} candidates of shape {shapes}")
    rows = coarse_rows(logits[coarse], batch.candidates[coarse])
    rows = rows if batch.weight is None else rows * batch.weight[coarse]
    total = labels + len(rows)
    if weights is None:
        return HardLoss((value * labels + rows.sum()) / max(total, 1), total, None)
    divisor = weights + len(rows)
    return HardLoss((value * weights + rows.sum()) / torch.where(divisor > 0, divisor, 1), total, divisor)


def _fine(loss: nn.Module, task: Task, logits: Tensor, batch: Batch) -> HardLoss:
    """Return the same without the coarse labels."""
    if batch.weight is not None and (task == "multilabel" or batch.weight.shape != (len(batch),)):
        raise InputError(
            f"weights must be one a row, (B,) = [{len(batch)}], and not in the multilabel task; "
            f"got {[*batch.weight.shape]} for {task}"
        )
    y = batch.y
    if y is None:
        return _without_labels(loss, task, logits)
    if task == "binary" and batch.partner is not None and y.ndim == 2 and y.shape[1] == 2:
        y = y[:, 1]  # mixed labels of two classes are their probabilities
    if task in ("binary", "regression") and _is_single(logits, y):
        logits, y = logits.flatten(), y.flatten()
    soft = task == "multiclass" and y.ndim == 2 and y.is_floating_point()  # probabilities
    classes = task == "multiclass" and not soft
    if not labels_fit(task, logits, y):
        if is_own(loss) and len(y) == len(logits):
            return _own(loss, logits, y, batch)
        if y.shape == logits.shape[:1] and not is_labeled(y).any():  # of a stream, which has not seen the labels' shape
            return _without_labels(loss, task, logits)
        if task == "regression" and batch.partner is not None:
            raise InputError(
                f"mixed labels {[*y.shape]} are probabilities of classes, since labels are whole numbers; for the "
                "regression task give them as floats"
            )
        raise InputError(f"{task} labels of shape {[*y.shape]} do not fit logits of shape {[*logits.shape]}{_ADVICE}")
    fields = row_values(loss, batch)
    weight = batch.weight
    rows, known = batch.labeled, None
    if rows is None:
        known = is_labeled(y)
        rows = known if known.ndim == 1 else known.any(dim=1)
        known = rows if soft else known  # a row that is NaN in part is refused below
        if known.all():
            known = rows = None
    elif len(rows) == len(y):
        rows = None
    if rows is not None:  # else these are all rows, and indexing would take longer
        fields = {name: values[rows] for name, values in fields.items()}
        weight = None if weight is None else weight[rows]
        logits, y = logits[rows], y[rows]
    if y.numel() == 0 and not is_stateful(loss):
        return HardLoss(logits.sum(), 0, None if soft else _sum(class_weights(loss, y.long())))
    if known is not None and (known := known[rows]).all():
        known = None
    if soft:
        _check_takes_probabilities(loss)
        _check_probabilities(y)
    else:
        _check_labels(task, y if known is None or must_synchronize(y) else y[known], logits)
    if known is not None:  # some labels of a row are missing
        value = mean_of_known(loss, logits, y.to(logits.dtype), known, weight, **fields)
        return HardLoss(value, int(known.sum()), None)
    y = y.long() if classes else y.to(logits.dtype)
    labels = len(y) if soft else y.numel()
    return HardLoss(mean_loss(loss, logits, y, weight, **fields), labels, _sum(class_weights(loss, y)))


def default_loss(task: Task) -> nn.Module:
    """Return the hard loss of a task where the project sets none."""
    if task == "regression":
        return nn.MSELoss()
    return nn.CrossEntropyLoss() if task == "multiclass" else nn.BCEWithLogitsLoss()


def labels_fit(task: Task, logits: Tensor, y: Tensor) -> bool:
    """Whether labels have the shape that a task needs for these outputs."""
    if task == "multiclass":
        return logits.ndim == 2 and y.shape in (logits.shape[:1], logits.shape if y.is_floating_point() else None)
    if task != "multilabel" and _is_single(logits, y):
        return len(y) == len(logits)
    return task != "binary" and logits.ndim == 2 and y.shape == logits.shape


def _is_single(outputs: Tensor, y: Tensor) -> bool:
    """Whether there is one output and one label a row: (B,) or (B, 1)."""
    return {outputs.shape[1:], y.shape[1:]} <= {(), (1,)}


_ADVICE = "; dense outputs, such as (B, C, H, W) or (B, T, C), need class_dim"


def _own(loss: nn.Module, outputs: Tensor, y: Tensor, batch: Batch) -> HardLoss:
    """Return a project's own loss of the rows that have a label, with labels of any shape."""
    rows = is_labeled(y).flatten(1).any(dim=1) if y.ndim > 1 else is_labeled(y)
    labels = int(rows.sum())
    if not labels and not is_stateful(loss):
        return HardLoss(outputs.sum() * 0, 0, None)
    weight = None if batch.weight is None else batch.weight[rows]
    fields = {name: values[rows] for name, values in row_values(loss, batch).items()}
    return HardLoss(mean_loss(loss, outputs[rows], y[rows], weight, **fields), labels, None)


def _without_labels(loss: nn.Module, task: Task, logits: Tensor) -> HardLoss:
    """Return the loss of a batch that has no ``y``. A stateful loss runs on every process, also without rows."""
    none = logits[:0].flatten() if task == "binary" else logits[:0]
    y = torch.zeros(0, dtype=torch.long, device=logits.device)
    value = none.sum()
    if is_stateful(loss):
        target = y if task == "multiclass" else torch.zeros_like(none)
        value = mean_loss(loss, none, target, **dict.fromkeys(row_fields_of(loss), y))
    return HardLoss(value, 0, _sum(class_weights(loss, y)))


def _sum(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.sum()


def _check_takes_probabilities(loss: nn.Module) -> None:
    name = type(loss).__name__
    if not (isinstance(loss, nn.CrossEntropyLoss) or is_own(loss)):
        raise InputError(f"labels are probabilities (B, C), which {name} does not take; use CrossEntropyLoss")
    if isinstance(loss, nn.CrossEntropyLoss) and loss.ignore_index >= 0:
        raise InputError(
            f"labels are probabilities (B, C), but ignore_index: {loss.ignore_index} of {name} is for class indices; "
            "leave it out"
        )


def _check_probabilities(y: Tensor) -> None:
    """Raise InputError unless rows (N, C) are probabilities, to the precision of their type."""
    if must_synchronize(y) or not y.numel():
        return
    off = (y.float().sum(dim=1) - 1).abs()
    if not (float(y.min()) >= 0 and float(off.max()) <= 1e-2):  # NaN is neither
        bad = y[(off.nan_to_num(1) > 1e-2) | (y.amin(dim=1) < 0)][0].tolist()
        raise InputError(
            "labels (B, C) that are floats must be probabilities, with a sum of 1 in each row, or NaN in a whole row "
            f"without a label; got a row {bad}"
        )


def _check_labels(task: Task, y: Tensor, logits: Tensor) -> None:
    """Raise InputError for a label that is no class of the logits; of the regression task one that is infinite.

    Binary and multilabel labels may be probabilities.
    """
    if task == "multiclass" and y.is_floating_point():
        _check_whole(y, logits.shape[1])
    if must_synchronize(y):
        return
    if task == "regression":
        if y.isinf().any():
            raise InputError(f"labels must be finite, or NaN for a missing one, got {y[y.isinf()][0].item()}")
        return
    top = logits.shape[1] - 1 if task == "multiclass" else 1
    if not y.numel():
        return
    low, high = y.aminmax()
    if not (low.item() >= 0 and high.item() <= top):  # NaN is neither
        bad = y[~((y >= 0) & (y <= top))][0].item()
        raise InputError(
            f"labels must be 0 ... {top} (the student gives {[*logits.shape][1:] or 1} logits), or -100 (NaN "
            f"where floats) for a missing one; got {bad:g}"
        )


def _check_whole(y: Tensor, classes: int) -> None:
    """Raise InputError for class numbers (N,) as floats that have fractions, or that their type may have rounded."""
    most = round(2 / torch.finfo(y.dtype).eps)  # a type with p bits counts up to 2**p
    if classes > most + 1:
        raise InputError(
            f"labels of the multiclass task must be integers: the student has {classes} classes, and "
            f"{str(y.dtype).removeprefix('torch.')} cannot hold each number above {most}"
        )
    # also on other devices, where floats are rare: a fraction would be cut off
    if (fractions := y[y != y.trunc()]).numel():
        raise InputError(
            "labels (B,) of the multiclass task must be whole class numbers, or -100 (NaN where floats) for a missing "
            f"one; got {fractions[0].item():g}; probabilities have the shape (B, C)"
        )


def must_synchronize(tensor: Tensor) -> bool:
    """Whether reading a value waits until its device has finished all its work."""
    return tensor.device.type != "cpu"
