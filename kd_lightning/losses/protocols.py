"""What a loss may declare about itself, and what the modules then do."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

RowField = Literal["kind", "index"]
"""A field of :class:`~kd_lightning.batch.Batch` that a hard loss may take for each row."""


@runtime_checkable
class RowLoss(Protocol):
    """A hard loss that takes more about each row than its logits and its target.

    The modules call it as ``loss(logits, target, kind=..., index=...)``, with the declared fields only. A field that
    the batch lacks is left out, so give these parameters a default.

    >>> import torch
    >>> class WeightBySample(torch.nn.Module):
    ...     row_fields = ("index",)
    ...     is_stateful = False
    """

    @property
    def row_fields(self) -> tuple[RowField, ...]:
        """The declared fields: ``"kind"`` (numbers of LabelKind, (B,)), ``"index"`` (samples, (B,)), both or none."""


@runtime_checkable
class StatefulLoss(Protocol):
    """A hard loss that may store values of each sample.

    While ``is_stateful`` is True:

    - It runs on every process, also on an empty batch, so that the processes can exchange values.
    - It serves one network only. Modules that train two networks with one hard loss refuse it.
    - :meth:`reset` is called when a fit starts.

    A loss that takes ``"index"`` must declare ``is_stateful``, True or False.
    """

    @property
    def is_stateful(self) -> bool:
        """Whether the loss stores values of each sample."""

    def reset(self) -> None:
        """Delete what the loss has stored."""


@runtime_checkable
class SoftLoss(Protocol):
    """A loss between a student's and a teacher's logits: ``loss(student_logits, teacher_logits, target)``.

    All declarations are optional for the soft loss that a user gives to a module. The functions in
    :mod:`kd_lightning.losses.base` that read them hold the defaults.
    """

    @property
    def task(self) -> str:
        """What the logits mean: "multiclass", "multilabel" or "binary". Default: the module's task."""

    @property
    def temperature(self) -> float:
        """The temperature at which probabilities are compared. Default: 1."""

    @property
    def standardize(self) -> bool:
        """Whether the loss standardizes each row of both logits first. Default: False."""

    @property
    def supports_top_k(self) -> bool:
        """Whether the teacher's top k logits and the sum of its other probabilities are enough. Default: False."""


def is_own(loss: object) -> bool:
    """Whether a loss is a project's own: neither one of torch nor one of this package."""
    return type(loss).__module__.partition(".")[0] not in ("torch", "kd_lightning")
