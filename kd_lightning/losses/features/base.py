"""What the feature losses share: checks, types, and the positions that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import at_least_float32


def pair_features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two features of one shape in the student's type, at least float32; the teacher's has no gradient.

    Args:
        student: (B, C, ...), after the projector.
        teacher: (B, C, ...).

    Raises:
        InputError: If their shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"features of student and teacher must have one shape, got {[*student.shape]} and {[*teacher.shape]}; "
            "a projector joins them"
        )
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def pair_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two features of any shapes in the student's type, at least float32; their numbers of samples must agree.

    Args:
        student: (B, ...).
        teacher: (B, ...). The result has no gradient.

    Raises:
        InputError: If their numbers of samples differ.
    """
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise InputError(
            f"features of student and teacher must be (B, C, ...) of the same samples, got {[*student.shape]} and "
            f"{[*teacher.shape]}"
        )
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def counted_positions(feature: Tensor, batch: Batch | None) -> Tensor | None:
    """Return which positions of a feature count, (B, P) booleans; None if all do, or if the mask has other positions.

    Args:
        feature: (B, C, ...), with P positions after the channels.
        batch: The batch, whose ``position_mask`` may leave some out.
    """
    mask = None if batch is None else batch.position_mask
    if mask is None or mask.shape != feature.shape[:1] + feature.shape[2:]:
        return None
    return mask.to(feature.device, torch.bool).unsqueeze(-1).flatten(1)


def at_positions(feature: Tensor, counted: Tensor | None) -> Tensor:
    """Return a feature (B, C, ...) as (B, C, P), with 0 at the positions that do not count.

    Args:
        feature: A vector (B, C) has one position.
        counted: (B, P), or None if all positions count.
    """
    feature = feature.unsqueeze(-1).flatten(2)
    return feature if counted is None else feature.masked_fill(~counted.unsqueeze(1), 0)


def without_padding(feature: Tensor, batch: Batch | None) -> Tensor:
    """Return a feature (B, C, ...) with 0 at the positions that do not count, see :func:`counted_positions`."""
    return at_positions(feature, counted_positions(feature, batch)).view_as(feature)


def pair_positions(student: Tensor, teacher: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return two features of one shape as (B, C, P), and which positions count, (B, P) or None.

    Args:
        student: (B, C, ...), after the projector.
        teacher: The same shape.
        batch: See :func:`counted_positions`.

    Returns:
        The features, see :func:`pair_features` and :func:`at_positions`, and :func:`counted_positions`.

    Raises:
        InputError: If the shapes differ, or are not (B, C, ...).
    """
    student, teacher = pair_rows(*pair_features(student, teacher))
    counted = counted_positions(student, batch)
    return at_positions(student, counted), at_positions(teacher, counted), counted


def mean_of_positions(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean over the samples of each one's mean over its positions that count, a scalar.

    A sample without such a position contributes 0. The mean of no samples is 0, in the graph.

    Args:
        values: (B, P).
        counted: (B, P), or None if all positions count.
    """
    if counted is None:
        return values.sum() / max(values.numel(), 1)
    rows = values.masked_fill(~counted, 0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return rows.sum() / max(len(rows), 1)


def unit_vectors(values: Tensor, dim: int) -> Tensor:
    """Scale vectors along ``dim`` to length 1. Zero vectors stay zero, with zero gradients."""
    length: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.masked_fill(length == 0, torch.inf)


def pair_pooled(student: Tensor, teacher: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return two features as (B, C, P) of the same positions, and which of them count, (B, P) or None.

    Along each side, the larger feature is averaged to the size of the smaller one. An average is one over the positions
    that count, and counts if there is one.

    Args:
        student: (B, C, ...).
        teacher: (B, D, ...), with as many sides.
        batch: See :func:`counted_positions`.

    Returns:
        The features in the student's type, at least float32, with 0 at the positions that do not count. The teacher's
        has no gradient.

    Raises:
        InputError: If their numbers of samples or of sides differ.
    """
    if student.ndim != teacher.ndim:
        raise InputError(
            f"features of student and teacher must have as many sides, got {[*student.shape[2:]]} and "
            f"{[*teacher.shape[2:]]} after the channels"
        )
    student, teacher = pair_rows(student, teacher)
    size = torch.Size(map(min, student.shape[2:], teacher.shape[2:]))
    student, of_student = pool(student, size, batch)
    teacher, of_teacher = pool(teacher, size, batch)
    masks = [counted for counted in (of_student, of_teacher) if counted is not None]
    counted = torch.stack(masks).all(dim=0) if masks else None
    return at_positions(student, counted), at_positions(teacher, counted), counted


def pool(feature: Tensor, size: torch.Size, batch: Batch | None) -> tuple[Tensor, Tensor | None]:
    """Average a feature (B, C, ...) in equal areas of its positions that count.

    Args:
        feature: (B, C, ...).
        size: Sizes of the sides of the result, not longer than the feature's.
        batch: See :func:`counted_positions`.

    Returns:
        The averages (B, C, ...), 0 where no position counts, and where there is one, (B, P), or None if all count.
    """
    counted = counted_positions(feature, batch)
    pooled = pool_to(at_positions(feature, counted).view_as(feature), size)
    if counted is None:
        return pooled, None
    shares = pool_to(counted.to(feature.dtype).view(len(feature), 1, *feature.shape[2:]), size)
    return pooled / shares.masked_fill(shares == 0, 1), (shares > 0).unsqueeze(-1).flatten(2).squeeze(1)


def pool_to(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average maps (B, C, ...) in equal areas of their positions, to sides that are not longer."""
    for dim, side in enumerate(size, 2):
        length, rest = divmod(maps.shape[dim], side)
        if length > 1 and not rest:  # torch has no deterministic gradient for the other case on a GPU
            maps = maps.reshape(*maps.shape[:dim], side, length, *maps.shape[dim + 1 :]).mean(dim + 1)
    return maps if [*maps.shape[2:]] == [*size] else F.interpolate(maps, [*size], mode="area")


def pair_samples(student: Tensor, teacher: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
    """Return two features of any shapes as one vector for each sample, (B, D) and (B, E), see :func:`pair_rows`.

    Args:
        student: (B, C, ...).
        teacher: (B, ...).
        batch: See :func:`counted_positions`. Entries at positions that do not count are 0.

    Raises:
        InputError: If their numbers of samples differ.
    """
    student, teacher = pair_rows(student, teacher)
    return without_padding(student, batch).flatten(1), without_padding(teacher, batch).flatten(1)
