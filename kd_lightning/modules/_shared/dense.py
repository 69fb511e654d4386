"""Dense batches as rows: losses and metrics are written for logits (N, C), one row for each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, class_weights, predicted_labels, to_probabilities
from kd_lightning.losses.protocols import is_stateful
from kd_lightning.losses.rows import to_rows

_OF_SAMPLES = ("index", "view", "kind", "weight")
"""Fields of a batch that hold one number a sample, which all rows of the sample have."""


def check_dense(class_dim: int | None, causal: bool, task: Task, hard_loss: nn.Module) -> None:
    """Raise InputError if ``class_dim``, ``causal`` and the hard loss do not fit."""
    if class_dim == 0:
        raise InputError("class_dim: 0 is the dimension of samples; classes are in 1 of (B, C, H, W), -1 of (B, T, C)")
    if causal and (class_dim != -1 or task != "multiclass"):
        raise InputError(f"causal needs class_dim: -1 and task: multiclass, got class_dim {class_dim}, task {task}")
    if class_dim is not None and is_stateful(hard_loss):
        raise InputError(
            f"hard_loss: {type(hard_loss).__name__} stores values of samples, but with class_dim a sample has many rows"
        )


def dense_probabilities(logits: Tensor, task: Task, class_dim: int | None) -> Tensor:
    """Return probabilities, or values of the regression task, in the shape of the outputs.

    Args:
        logits: The outputs.
        task: The module's task. Those of the binary task have no dimension of classes.
        class_dim: The dimension of the outputs that holds classes; None for (B, C).
    """
    if class_dim is None:
        return to_probabilities(logits, task)
    moved = logits.movedim(class_dim, -1)
    if task == "binary":
        return to_probabilities(moved, task).view(moved.shape[:-1])
    return to_probabilities(moved, task).movedim(-1, class_dim)


def dense_predictions(logits: Tensor, task: Task, class_dim: int) -> Tensor:
    """Return predicted classes (B, ...), labels in the shape of the outputs, or values of the regression task."""
    moved = logits.movedim(class_dim, -1)
    if task == "multiclass":
        return predicted_labels(moved, task)
    if task == "binary":
        return predicted_labels(moved, task).view(moved.shape[:-1])
    return logits.detach() if task == "regression" else predicted_labels(logits, task)


def dense_to_rows(
    batch: Batch, outputs: Sequence[Tensor], task: Task, class_dim: int, causal: bool = False
) -> tuple[Batch, list[Tensor]]:
    """Turn the outputs and labels of a dense batch into rows, one for each position that counts.

    A position counts if ``batch.position_mask`` has it, and if it has a label, or its sample has none at all: a sample
    without any label is unlabeled, and all of its positions teach; the other samples leave out their positions without
    a label (void, padding). ``batch.labeled`` names samples that have labels, also where a crop shows void alone.

    Args:
        batch: The batch. Class indices ``y`` have the shape of the positions (B, ...); they may have a dimension of
            size 1 in place of the classes. Probabilities, multilabel and regression targets have the outputs' shape.
        outputs: Outputs of one shape, such as (B, C, H, W) or (B, T, C).
        task: The module's task.
        class_dim: The dimension of the outputs that holds classes.
        causal: Whether outputs of position t are compared with the label of position t + 1.

    Returns:
        A batch of N rows without inputs (``x`` is the first output), and the outputs (N, C).

    Raises:
        InputError: If outputs, labels, mask and ``class_dim`` do not fit.
    """
    shape = [*outputs[0].shape]
    if len(shape) < 3 or not -len(shape) <= class_dim < len(shape) or class_dim % len(shape) == 0:
        raise InputError(
            f"class_dim: {class_dim} needs outputs of at least 3 dimensions, such as (B, C, H, W) with 1 or (B, T, C) "
            f"with -1, got {shape}; leave it out for (B, C)"
        )
    if batch.candidates is not None or batch.soft is not None:
        raise InputError("class_dim: coarse labels and stored pseudo-labels are for one label a sample")
    classes = shape.pop(class_dim)
    if task == "binary" and classes != 1:
        raise InputError(
            f"class_dim: binary outputs have one class, such as (B, 1, H, W) with 1, got {[*outputs[0].shape]}"
        )
    y = None if _has_no_labels(batch.y) else batch.y
    y, mask = _labels(y, task, class_dim, len(shape)), batch.position_mask
    like_outputs = y is not None and _is_like_outputs(task, y)
    if y is not None and [*y.shape] != ([*shape, classes] if like_outputs else shape):
        of_positions = "; they must have one shape" if like_outputs else f", one for each position {shape}"
        raise InputError(
            f"{task} labels of shape {[*batch.y.shape]} do not fit outputs {[*outputs[0].shape]}{of_positions}"  # type: ignore[union-attr]
        )
    if mask is not None and [*mask.shape] != shape:
        raise InputError(f"mask must have one entry for each position, {shape}, got {[*mask.shape]}")
    outputs = [output.movedim(class_dim, -1) for output in outputs]
    if causal:
        shape[1] -= 1
        outputs = [output[:, :-1] for output in outputs]
    y, mask, keep = _positions(y, mask, len(shape), causal, batch.labeled)
    samples: dict[str, Any] = {name: getattr(batch, name) for name in _OF_SAMPLES}
    for name, value in samples.items():
        if value is not None:
            samples[name] = to_rows(value.view(-1, *[1] * (len(shape) - 1)).expand(shape), None, keep).flatten()
    rows = [to_rows(output, -1, keep) for output in outputs]
    if y is not None:
        y = to_rows(y, -1, keep) if y.ndim > len(shape) else to_rows(y, None, keep).flatten()
    means = batch.dense_means
    labels, every = (None, None) if means is None else means[:2]
    return Batch(rows[0], y, **samples, mean_labels=labels, mean_rows=every, dense_means=means), rows


def count_dense(
    batch: Batch, task: Task, class_dim: int, causal: bool = False, hard_loss: nn.Module | None = None
) -> tuple[float, ...] | None:
    """Count the known labels and the rows of a batch, as :func:`dense_to_rows` finds them, without any outputs.

    Args:
        batch: The batch.
        task: The module's task.
        class_dim: The dimension of the outputs that holds classes.
        causal: Whether outputs are compared with the label of the next position.
        hard_loss: The hard loss. If it has class weights, their sum over the labels is the third number.

    Returns:
        The numbers. None if there is neither a label nor a mask, so that the positions are not known.
    """
    if _has_no_labels(batch.y):
        mask = batch.position_mask
        return None if mask is None else (0, int(((mask[:, 1:] if causal else mask) != 0).sum()))
    y, known, keep, dimensions = _known(batch, task, class_dim, causal)
    rows = y.shape[:dimensions].numel() if keep is None else int(keep.sum())
    counts = int(known.sum()), rows
    if task != "multiclass" or y.is_floating_point() or hard_loss is None:
        return counts
    target, weight = y[known].long(), getattr(hard_loss, "weight", None)
    weights = class_weights(hard_loss, target.to(weight.device) if isinstance(weight, Tensor) else target)
    return counts if weights is None else (*counts, float(weights.double().sum()))


def labeled_samples(batch: Batch, task: Task, class_dim: int, causal: bool = False) -> Tensor:
    """Return which samples of a dense batch have a label that counts, (B,) booleans.

    Args:
        batch: The batch.
        task: The module's task.
        class_dim: The dimension of the outputs that holds classes.
        causal: Whether outputs are compared with the label of the next position.
    """
    if _has_no_labels(batch.y):
        return torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    known = _known(batch, task, class_dim, causal)[1].flatten(1).any(dim=1)
    if batch.labeled is not None:
        known[batch.labeled.to(known.device)] = True
    return known


def _known(batch: Batch, task: Task, class_dim: int, causal: bool) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return labels, which of them are known and not masked, which positions count, and the positions' dimensions."""
    assert batch.y is not None
    mask, like_outputs = batch.position_mask, _is_like_outputs(task, batch.y)
    # class indices may have a dimension of size 1 in place of the classes, which a mask has not
    dimensions = batch.y.ndim - (like_outputs or (mask is not None and batch.y.ndim > mask.ndim))
    y = _labels(batch.y, task, class_dim, dimensions)
    assert y is not None
    if mask is not None and mask.shape != y.shape[:dimensions]:
        raise InputError(f"mask must have one entry for each position, {[*y.shape[:dimensions]]}, got {[*mask.shape]}")
    y, mask, keep = _positions(y, mask, dimensions, causal, batch.labeled)
    assert y is not None
    known = is_labeled(y)
    if task == "multiclass" and like_outputs:  # probabilities
        known = known.all(dim=-1)
    if mask is not None:
        known = known & (mask if known.ndim == mask.ndim else mask.unsqueeze(-1))
    return y, known, keep, dimensions


def _has_no_labels(y: Tensor | None) -> bool:
    """Whether there are no dense labels: none at all, or one a sample, as of a source without labels, all missing."""
    return y is None or (y.ndim == 1 and not is_labeled(y).any())


def _is_like_outputs(task: Task, y: Tensor) -> bool:
    """Whether labels have the shape of the outputs: all but class indices."""
    return task in ("multilabel", "regression") or (task == "multiclass" and y.is_floating_point())


def _labels(y: Tensor | None, task: Task, class_dim: int, dimensions: int) -> Tensor | None:
    """Return labels in the shape of the positions, or with the classes as their last dimension.

    Args:
        y: The labels.
        task: The module's task.
        class_dim: The dimension of the outputs that holds classes.
        dimensions: Number of the positions' dimensions, with that of the batch.
    """
    if y is None or y.ndim != dimensions + 1:
        return y
    if _is_like_outputs(task, y):
        return y.movedim(class_dim, -1)
    return y.squeeze(class_dim)  # which stays unless its size is 1


def _positions(
    y: Tensor | None, mask: Tensor | None, dimensions: int, causal: bool, labeled: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return labels and mask, shifted if ``causal``, and which positions count as booleans; None if all do.

    Args:
        y: The labels.
        mask: Which positions exist.
        dimensions: Number of the positions' dimensions.
        causal: Whether outputs are compared with the label of the next position.
        labeled: Numbers of the samples that have labels, also where a crop shows void alone. If None, ``y`` decides.
    """
    if causal:
        y = None if y is None else y[:, 1:]
        mask = None if mask is None else mask[:, 1:]
    mask = None if mask is None else mask != 0
    if y is None:
        return y, mask, mask
    known = is_labeled(y)
    known = known.any(dim=-1) if known.ndim > dimensions else known
    known = known if mask is None else known & mask
    unlabeled = ~known.flatten(1).any(dim=1)
    if labeled is not None:
        unlabeled[labeled.to(unlabeled.device)] = False
    keep = known | unlabeled.view(-1, *[1] * (dimensions - 1))
    keep = keep if mask is None else keep & mask
    return y, mask, keep
