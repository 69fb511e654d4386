"""What a loss may declare about itself, and what the modules then do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from kd_lightning.batch import Batch

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


class FeatureLoss(Protocol):
    """A loss between features: ``loss(student_feature, teacher_feature, batch)``, a scalar mean over the samples.

    Both features are (B, C) or (B, C, ...): tokens and maps have their channels in dimension 1, whatever the layers
    return. The student's comes out of the projector, if there is one. The teacher's has no gradient. The loss may have
    parameters, which train beside the student, and buffers; both are in checkpoints, and are never deployed. A term
    with several pairs of layers has a copy of the loss for each one. All declarations are optional.
    """

    @property
    def needs_projector(self) -> bool:
        """Whether the two features must have one shape, so that a projector is built. Default: True."""

    @property
    def trains_only(self) -> bool:
        """Whether the loss has no value in validation, as where it depends on a memory of the training samples.

        Default: False.
        """

    def build(self, student: Sequence[int], teacher: Sequence[int], samples: int | None) -> None:
        """Make what depends on the shapes. Called once before training, and before weights are loaded.

        Random numbers come from torch's generator, which is seeded alike on all processes. Default: nothing to make.

        Args:
            student: Shape (C, ...) of the student's feature of one sample, after the projector.
            teacher: Shape of the teacher's.
            samples: Number of samples of the data, where it is known; ``Batch.index`` is below it.
        """

    def reset(self, samples: int | None) -> None:
        """Delete what is stored of samples. Called at the start of each further fit. Default: nothing to delete.

        Args:
            samples: Number of samples of the data, where it is known.
        """

    def __call__(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        """Return the loss, a scalar."""


def is_own(loss: object) -> bool:
    """Whether a loss is a project's own: neither one of torch nor one of this package."""
    return type(loss).__module__.partition(".")[0] not in ("torch", "kd_lightning")
