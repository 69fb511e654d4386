"""How outputs of a teacher are stored, and how far two sets of them are apart."""

from __future__ import annotations

import math

from torch import Tensor

from kd_lightning.cache.codecs import Codec, DenseCodec, TopKCodec
from kd_lightning.cache.outputs import OutputRows
from kd_lightning.cache.row_format import Part, RowFormat
from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher


def format_of(teacher: Teacher, rows: OutputRows, dtype: str, class_dim: int | None) -> RowFormat:
    """Decide how outputs are stored. Without ``cache_top_k``, dense ones of one shape are stored as they are.

    Args:
        teacher: The teacher.
        rows: Some outputs.
        dtype: Type of the stored values, ``"float16"`` or ``"float32"``.
        class_dim: The dimension of dense logits that holds classes, if it is known.

    Raises:
        InputError: If ``cache_top_k`` is set, and there are no logits, or it is not known where the classes are.
    """
    features = {
        name: Part(_dense(feature, dtype), feature.shape[1:], feature.dtype, pool=teacher.layers[name])
        for name, feature in rows.features.items()
    }
    of_tokens = any(rows.tokens in part.shape and len(part.shape) > 1 for part in features.values())
    tokens = rows.tokens if of_tokens else None
    if rows.logits is None:
        if teacher.cache_top_k is not None:
            raise InputError(f"cache_top_k needs a module that uses the teacher's logits, got {teacher.cache_top_k}")
        return RowFormat(None, features, tokens=tokens)
    return RowFormat(_logits(teacher, rows, dtype, class_dim), features, _is_ragged(rows), tokens)


def _dense(values: Tensor, dtype: str) -> Codec:
    return DenseCodec(values.shape[1:].numel(), dtype)


def _is_ragged(rows: OutputRows) -> bool:
    return rows.lengths is not None and rows.logits is not None and rows.logits.ndim > 2


def _logits(teacher: Teacher, rows: OutputRows, dtype: str, class_dim: int | None) -> Part:
    """Return how logits are stored."""
    logits = rows.logits
    assert logits is not None
    if logits.ndim < 3 or (rows.lengths is None and teacher.cache_top_k is None):
        return Part(_codec(teacher, logits.shape[1:].numel(), dtype), logits.shape[1:], logits.dtype)
    if class_dim is None or class_dim % logits.ndim == 0:
        raise InputError(
            f"cache_top_k needs logits (B, C), or the class_dim of the module, got outputs {['B', *logits.shape[1:]]}"
        )
    class_dim %= logits.ndim
    codec = _codec(teacher, logits.shape[class_dim], dtype)
    return Part(codec, logits.shape[1:], logits.dtype, class_dim)


def _codec(teacher: Teacher, count: int, dtype: str) -> Codec:
    """Return the codec of ``count`` logits."""
    if teacher.cache_top_k is None:
        return DenseCodec(count, dtype)
    kept = None
    if teacher.classes is not None and None in teacher.classes:
        kept = [output for output, number in enumerate(teacher.classes) if number is not None]
    return TopKCodec(count, dtype, teacher.cache_top_k, kept)


class Distances:
    """The distances of two sets of outputs, one batch after the other: one for each part, since their scales differ.

    Attributes:
        parts: The distance of each part, by its name.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Distance] = {}

    def add(self, one: OutputRows, other: OutputRows) -> None:
        """Add some rows, one by one, since outputs may be large."""
        for name, values in one.parts.items():
            distance = self.parts.setdefault(name, Distance())
            for row, expected in zip(values, other.parts[name], strict=True):
                distance.add(row, expected)

    def within(self, share: float) -> bool:
        """Whether each part's largest difference is at most this share of its largest value."""
        return all(part.within(share) for part in self.parts.values())

    def changes(self, share: float) -> bool:
        """Whether this share of the values of any part differs; zeros in both do not count."""
        return any(part.changed >= share * max(part.count, 1) for part in self.parts.values())


class Distance:
    """The distance of two sets of outputs, one part after the other.

    Attributes:
        count: Number of outputs that are not 0 in both sets, as those after a ReLU are.
        changed: Number of outputs that differ.
        farthest: Largest difference; NaN if an output is NaN, or infinite, in one of them alone.
        largest: Largest absolute value of the finite outputs of the second.
    """

    def __init__(self) -> None:
        self.count = self.changed = 0
        self.farthest = self.largest = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Add a part."""
        same = (one == other) | (one.isnan() & other.isnan())
        self.count += int(((one != 0) | (other != 0)).sum())
        self.changed += int((~same).sum())
        if other.numel():
            distance = float((one.float() - other.float()).abs().masked_fill(same, 0).max())
            self.farthest = distance if math.isnan(distance) else max(distance, self.farthest)
            self.largest = max(self.largest, float(other.abs().where(other.isfinite(), 0).max()))

    def within(self, share: float) -> bool:
        """Whether the largest difference is at most this share of the largest value."""
        return self.farthest <= share * self.largest
