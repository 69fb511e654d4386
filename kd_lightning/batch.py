"""The batch that all modules and losses read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import nan
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.inputs import (
    describe,
    device_of,
    map_inputs,
    rows_of,
    take_rows,
    tensors_of,
)
from kd_lightning.teacher_outputs import TeacherOutputs

IGNORE_INDEX = -100
"""A label that training may not see (``NaN`` where targets are floats)."""
LABEL_KEYS = ("labels", "label", "target", "targets", "y")
"""Keys under which a mapping may hold its labels. The first one that it has counts."""
DENSE_LABEL_KEY = "mask"
"""The key of the labels where a mapping has none of ``LABEL_KEYS``: beside one of them, a mask is an input."""


class LabelKind(IntEnum):
    """The kind of a row's label."""

    CLEAN = 0  # y is the label
    MISSING = 1  # there is no label
    PSEUDO = 2  # y is a pseudo-label
    COARSE = 3  # y is missing; candidates holds the possible classes
    NOISY = 4  # y may be wrong


@dataclass
class Batch:
    """A batch of B rows. All fields except ``x`` are optional.

    The data loader fills it. Modules and losses read it: they write neither its fields nor into its tensors. (It is no
    frozen dataclass, since Lightning could not move it to a device.)

    It unpacks as ``x, y = batch``, for modules that expect pairs. Without labels ``y`` is then -100 in all rows.

    Attributes:
        x: Inputs: a tensor (B, ...), or a mapping or tuple of such tensors. A network is called as ``network(x)``,
            ``network(**x)`` or ``network(*x)``.
        y: Labels: (B,) class indices, (B, L) zeros and ones for the multilabel task, (B, C) probabilities of the
            multiclass task as floats (soft labels), or (B,) or (B, D) targets of the regression task. Dense labels have
            one for each position, (B, ...). A missing label is ``-100`` (``NaN`` where labels are floats).
        index: The sample of each row, (B,) integers. Labels and teacher outputs are looked up by it. It is -1 in the
            batch of a process without samples (see :attr:`is_padding`).
        view: The view (augmentation of the sample) of each row, (B,) integers.
        kind: The kind of each row's label, (B,) numbers of ``LabelKind``; (B, L) if the rows have several labels, some
            of which are pseudo-labels. If None, known labels are clean.
        weight: The factor of each row's hard loss, (B,). If None, it is 1.
        candidates: The classes that a coarse label allows, (B, C) booleans; all False in rows without coarse label.
        soft: Probabilities (B, C) that replace ``y`` in rows of pseudo-labels; 0 in other rows.
        x_strong: A second, stronger augmentation of the same samples, (B, ...).
        mean_labels: Mean number of known labels, coarse and pseudo-labels included, over the batches of this optimiser
            step (all processes, all accumulated batches). The hard term is divided by it, so that one process and two
            give the same gradient. The data loader sets it; if it does not, the module does.
        mean_pseudo: Mean number of pseudo-labels among ``mean_labels``.
        mean_coarse: Mean number of coarse labels among ``mean_labels``.
        mean_rows: Mean number of rows of these batches. If None, it is B.
        dense_means: Mean numbers of labels and of rows where each position of a dense sample is a row; a third one is
            the mean sum of the labels' class weights, if the hard loss has some. The loader sets them if the module
            has a method ``count_rows``. They take the place of the other means.
        labeled: Numbers (K,) of the rows whose label is known; of dense samples, those that have labels, even if a crop
            shows none of them. The loader sets it, so that no step searches ``y`` or synchronises with the device. If
            None, ``y`` is searched. Where other labels replace ``y``, set it to None.
        teacher_inputs: Inputs of teachers, where they differ from ``x`` (a higher resolution, other tokens): a tensor
            (B, ...), or a mapping or tuple of such tensors. If None, teachers get ``x``.
        teacher: Stored outputs of teachers, by name, where they are cached. If None, teachers compute. They belong to
            ``x`` as it is: where other inputs replace ``x``, set ``teacher`` to None. A dict is converted.
        partner: The sample that each row is mixed with, (B,) integers, by mixup or CutMix. ``y`` then holds the mixed
            labels. If None, rows are not mixed.
        share: The share of each row's own sample, (B,) floats in [0, 1]. In ``y``, weights of samples count, too.
        mask: Which positions of dense samples exist, (B, ...) booleans, or integers that are not 0. Padding never
            counts. If None, it is the ``attention_mask`` among the inputs, if there is one; else all positions exist.
    """

    x: Any
    y: Tensor | None = None
    index: Tensor | None = None
    view: Tensor | None = None
    kind: Tensor | None = None
    weight: Tensor | None = None
    candidates: Tensor | None = None
    soft: Tensor | None = None
    x_strong: Any = None
    mean_labels: float | Tensor | None = None
    mean_pseudo: float = 0.0
    mean_coarse: float = 0.0
    mean_rows: float | None = None
    dense_means: tuple[float, ...] | None = None
    labeled: Tensor | None = None
    teacher_inputs: Any = None
    teacher: TeacherOutputs | None = None
    mask: Tensor | None = None
    partner: Tensor | None = None
    share: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.teacher, dict):
            self.teacher = TeacherOutputs(self.teacher)

    @classmethod
    def from_any(cls, batch: Any) -> Batch:
        """Convert a batch of any data loader.

        Args:
            batch: One of these:

                - a ``Batch``, which is returned unchanged;
                - ``x``, a tensor;
                - ``(x, y)`` or ``(x, y, ...)``, of which only ``x`` and ``y`` count; ``x`` may be a mapping or tuple;
                - a mapping, whose labels are under the first of ``LABEL_KEYS`` that it has, else under
                  ``DENSE_LABEL_KEY``. Its ``teacher_inputs`` and ``x_strong`` are those of the batch. All other tensors
                  are ``x``: one tensor alone as it is, several as a mapping.

        Raises:
            InputError: If ``batch`` is anything else, or if two readings are possible: two images of one kind are no
                pair ``(x, y)``, and of two equal arrays of integers with a third one after them, either may be ``y``.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Tensor):
            return cls(batch)
        if isinstance(batch, Mapping):
            return cls._from_mapping(batch)
        if isinstance(batch, tuple | list) and len(batch):
            if len(batch) == 1 and isinstance(batch[0], Mapping):
                return cls._from_mapping(batch[0])
            first, named = batch[0], {}
            if isinstance(first, Mapping) and (named := _named(first)):
                first = {name: part for name, part in first.items() if name not in named}
                first = next(iter(first.values())) if len(first) == 1 else first
            x, y = _inputs(first), batch[1] if len(batch) > 1 else None
            if x is not None and (y is None or isinstance(y, Tensor)):
                _check_pair(x, y, batch)
                return cls(x, y, **named)
        raise InputError(
            "a batch must be a Batch, a tensor x, (x, y, ...), or a mapping with labels under "
            f"{', '.join(LABEL_KEYS)} or {DENSE_LABEL_KEY}; got {_kind(batch)}; the module's unpack(batch) can "
            "convert it"
        )

    @classmethod
    def _from_mapping(cls, batch: Mapping[Any, Any]) -> Batch:
        key = next((key for key in (*LABEL_KEYS, DENSE_LABEL_KEY) if key in batch), None)
        y = None if key is None else batch[key]
        named = _named(batch)
        x = _inputs({name: part for name, part in batch.items() if name != key and name not in named})
        if not x or not (y is None or isinstance(y, Tensor)):
            what = f"{key} is {_kind(y)}, no tensor" if x else "no input is a tensor"
            raise InputError(f"a batch is {_kind(batch)}, but {what}; the module's unpack(batch) can convert it")
        x = next(iter(x.values())) if len(x) == 1 else x
        return cls(x, y, **named)

    def __iter__(self) -> Iterator[Any]:
        yield self.x
        # never None: Lightning reads the size of a batch from what it yields, and would warn
        yield torch.full((len(self),), IGNORE_INDEX, device=self.device) if self.y is None else self.y

    def __len__(self) -> int:
        return len(self.x) if isinstance(self.x, Tensor) else rows_of(self.x)

    @property
    def teacher_x(self) -> Any:
        """The inputs of teachers: ``teacher_inputs``, or ``x`` if there are none."""
        return self.x if self.teacher_inputs is None else self.teacher_inputs

    @property
    def position_mask(self) -> Tensor | None:
        """Which positions of dense samples exist: ``mask``, else ``attention_mask`` of the inputs; None means all."""
        return self.x.get("attention_mask") if self.mask is None and isinstance(self.x, Mapping) else self.mask

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return device_of(self.x)

    @property
    def is_padding(self) -> bool:
        """Whether the only row is no sample: an evaluation on more processes than samples gives each one row."""
        return len(self) == 1 and self.index is not None and self.index.item() < 0

    def as_padding(self) -> Batch:
        """Return the batch with rows that are no samples: their index is -1, and they have no label."""
        assert self.index is not None
        y, none = self.y, torch.zeros(0, dtype=torch.long)
        y = None if y is None else torch.full_like(y, nan if y.is_floating_point() else IGNORE_INDEX)
        index = torch.full_like(self.index, -1)
        return replace(self, index=index, y=y, labeled=none, kind=None, candidates=None, soft=None, teacher=None)

    def split(self, sizes: Sequence[int]) -> Iterator[Batch]:
        """Yield batches of the first rows, the next rows, and so on; ``sizes`` add up to B.

        They share the memory of this batch, but for inputs that would not begin at a multiple of 64 bytes: products of
        such differ in the last bit with their place in memory, so a resumed run would differ from an unbroken one.
        """
        count, first, sizes = len(self), 0, [*sizes]
        own = {
            k: part for k, part in vars(self).items() if isinstance(part, Tensor) and part.ndim and len(part) == count
        }
        own.pop("labeled", None)
        nested = [name for name in _INPUTS if isinstance(getattr(self, name), Mapping | tuple | list)]
        pieces = {name: torch.split(part, sizes) for name, part in own.items()}
        for number, size in enumerate(sizes):
            parts: dict[str, Any] = {**vars(self), **{name: piece[number] for name, piece in pieces.items()}}
            rows = slice(first, first + size)
            parts |= {name: take_rows(getattr(self, name), rows, count) for name in nested}
            if self.labeled is not None and len(self.labeled) == count:
                parts["labeled"] = self.labeled[:size]
            elif self.labeled is not None:
                low, high = torch.searchsorted(self.labeled, torch.tensor([rows.start, rows.stop])).tolist()
                parts["labeled"] = self.labeled[low:high] - first
            if self.teacher is not None:
                parts["teacher"] = self.teacher.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
            parts |= {name: map_inputs(_align, parts[name]) for name in _INPUTS if parts[name] is not None}
            yield self._with_same_inputs(self._with(parts))
            first += size

    def select(self, rows: Tensor) -> Batch:
        """Return a batch of some rows, given by a boolean tensor (B,) or by their numbers."""
        count = len(self)
        parts: dict[str, Any] = {**vars(self), "labeled": None}
        for name, part in parts.items():
            if isinstance(part, Tensor) or name in _INPUTS:
                parts[name] = take_rows(part, rows, count)
        if self.teacher is not None:
            parts["teacher"] = self.teacher.map(lambda tensor: tensor[rows])
        return self._with_same_inputs(self._with(parts))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with all tensors on a device, copied without blocking where possible. Lightning calls it."""
        device = torch.device(device)
        if self._is_on(device):  # as on the CPU in each step: to() of each tensor takes longer
            return self._with(vars(self))
        blocking = device.type in ("cpu", "mps")  # as in Lightning: there a tensor could be read before its copy ends
        return self._with_same_inputs(self.map(lambda tensor: tensor.to(device, non_blocking=not blocking)))

    def _is_on(self, device: torch.device) -> bool:
        for name, part in vars(self).items():
            if isinstance(part, Tensor):
                if part.device != device:
                    return False
            elif part is not None and name in _INPUTS and any(t.device != device for t in tensors_of(part)):
                return False
        return self.teacher is None or self.teacher.is_on(device)

    def pin_memory(self) -> Batch:
        """Return the batch with all tensors in pinned memory. DataLoader calls it if ``pin_memory=True``."""
        return self._with_same_inputs(self.map(lambda tensor: tensor.pin_memory()))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with all tensors changed."""
        parts = {
            name: change(part) if isinstance(part, Tensor) else map_inputs(change, part) if name in _INPUTS else part
            for name, part in vars(self).items()
        }
        if self.teacher is not None:
            parts["teacher"] = self.teacher.map(change)
        return self._with(parts)

    def _with(self, parts: dict[str, Any]) -> Batch:
        """Return a batch of these attributes, which are the present ones in another form, or some of their rows."""
        batch = object.__new__(type(self))  # the constructor takes longer than a step may
        vars(batch).update(parts)
        return batch

    def _with_same_inputs(self, batch: Batch) -> Batch:
        """Return a batch of the same inputs, or of some rows; what is known of its inputs stays known."""
        if self.teacher is not None and batch.teacher is not None and self.teacher.are_of(self.teacher_x):
            batch.teacher.note_inputs(batch.teacher_x)
        return batch


def _align(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that begins at a multiple of 64 bytes, as torch allocates; a copy if it has to be."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


_INPUTS = ("x", "x_strong", "teacher_inputs")
"""Fields that may be mappings or tuples of tensors."""


def _named(batch: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the inputs of a mapping that a batch has fields for: those of teachers, and the strong view."""
    named = {name: _inputs(batch[name]) for name in _INPUTS[1:] if name in batch}
    strong, rest = named.get("x_strong"), {*batch} - {*named, *LABEL_KEYS, DENSE_LABEL_KEY}
    if isinstance(strong, Mapping) and len(strong) == 1 and {*strong} == rest:
        named["x_strong"] = next(iter(strong.values()))  # as x, which is one tensor alone
    return named


def _inputs(value: Any) -> Any:
    """Return a tensor as it is, of a mapping or row what is a tensor or holds one; None if nothing is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        parts = {name: _inputs(part) for name, part in value.items()}
        return {name: part for name, part in parts.items() if part is not None} or None
    if isinstance(value, tuple | list) and value and all(_inputs(part) is not None for part in value):
        return tuple(map(_inputs, value))
    return None


def _check_pair(x: Any, y: Tensor | None, batch: Sequence[Any]) -> None:
    """Raise InputError if ``(x, y, ...)`` may mean something else than inputs and their labels."""
    if not isinstance(x, Tensor) or y is None:
        return
    if min(x.ndim, y.ndim) > 2 and x.dtype == y.dtype and x.ndim == y.ndim and x.shape[:2] == y.shape[:2]:
        raise InputError(
            f"a batch holds images {describe(x)} and {describe(y)} of one kind, which are no inputs and labels; if "
            "they are, return Batch(x, y); the module's unpack(batch) can convert it"
        )
    integers = not (x.is_floating_point() or y.is_floating_point())
    if len(batch) > 2 and integers and x.ndim > 1 and x.shape == y.shape:
        raise InputError(
            f"a batch holds integers {describe(x)}, {describe(y)} and more, so that its labels are not known; return a "
            "mapping such as {input_ids, attention_mask, labels}; the module's unpack(batch) can convert it"
        )


def _kind(value: Any) -> str:
    """Describe what a value holds by its types."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_kind(part)}" for name, part in value.items()) + "}"
    return str([_kind(part) for part in value]) if isinstance(value, tuple | list) else type(value).__name__


def unpack(module: Any, batch: Any) -> Batch:
    """Convert a batch by the module's own ``unpack``, as all modules of this package have; else by ``from_any``.

    Raises:
        InputError: If the batch is of a kind that is not known.
    """
    own = getattr(module, "unpack", None)
    try:
        found = own(batch) if callable(own) else None  # of a Batch, too: a training step does the same
    except InputError:
        raise
    except Exception:  # of another project's method of this name
        found = None
    return found if isinstance(found, Batch) else Batch.from_any(batch)


def class_labels(y: Tensor) -> Tensor:
    """Return class indices (B,) as they are; of probabilities (B, C) the most likely class, or -100 for a NaN row."""
    if y.ndim != 2 or not y.is_floating_point():
        return y
    return torch.where(y.isnan().any(dim=1), IGNORE_INDEX, y.argmax(dim=1))


def is_labeled(y: Tensor) -> Tensor:
    """Return a boolean tensor of the shape of ``y``: True where the label is known."""
    if y.is_floating_point():
        return ~torch.isnan(y)
    return y != IGNORE_INDEX if y.dtype.is_signed else torch.ones_like(y, dtype=torch.bool)  # uint8: 156 == -100
