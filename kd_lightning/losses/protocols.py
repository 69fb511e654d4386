"""What a loss may declare about itself, and what the modules then do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from kd_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

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

    All declarations are optional for the soft loss that a user gives to a module. The functions below that read them
    hold the defaults. A loss in which the value of a row depends on the other rows of the batch also has
    ``compares_rows = True``.
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

        Random numbers come from torch's generator. If processes are seeded differently, all get the parameters of the
        first one, but each has its own buffers: draw these from a generator with a fixed seed. Default: nothing to
        make.

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


def row_fields_of(loss: nn.Module) -> tuple[RowField, ...]:
    """Return the row fields that a hard loss declares; () if it declares none."""
    if not hasattr(type(loss), "row_fields") and "row_fields" not in vars(loss):
        return ()  # an attribute that a module lacks is looked up for longer than all of this takes
    fields: tuple[RowField, ...] = loss.row_fields  # type: ignore[assignment]
    return fields


def row_values(loss: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the row fields (B,) that a hard loss declares and a batch has, by name."""
    if not (fields := row_fields_of(loss)):
        return {}
    if "index" in fields and batch.partner is not None:
        raise InputError(f"{type(loss).__name__} stores values of single samples; mixed rows (mix) are of two samples")
    values = {name: getattr(batch, name) for name in fields}
    return {name: value for name, value in values.items() if value is not None}


def is_stateful(loss: nn.Module) -> bool:
    """Whether a hard loss, or a loss inside it, stores values of each sample."""
    return any(isinstance(part, StatefulLoss) and part.is_stateful for part in loss.modules())


def reset_state(loss: nn.Module) -> None:
    """Call ``reset()`` of a hard loss and of the losses inside it, where they are stateful."""
    for part in loss.modules():
        if isinstance(part, StatefulLoss) and part.is_stateful:
            part.reset()


def check_row_fields(name: str, loss: nn.Module) -> None:
    """Check once that a hard loss declares the row fields that its ``forward`` takes, and whether it is stateful.

    Args:
        name: Name of the loss's key in error messages.
        loss: The hard loss.

    Raises:
        InputError: If ``forward`` has a parameter named like a row field and the loss declares no ``row_fields``; if a
            declared field is unknown or no parameter; if a loss that takes ``index`` does not declare ``is_stateful``;
            if a stateful loss has no method ``reset``.
    """
    owner, known = type(loss).__name__, get_args(RowField)
    declared = row_fields_of(loss)
    if not isinstance(declared, tuple) or not set(declared) <= set(known):
        raise InputError(f"{name}: {owner}.row_fields must be a tuple of names out of {known}, got {declared!r}")
    parameters = inspect.signature(loss.forward).parameters
    taken = tuple(field for field in known if field in parameters)
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not accepts_all and set(declared) - set(taken):
        raise InputError(f"{name}: {owner}.row_fields is {declared}, but forward takes {taken or 'none of them'}")
    if taken and not hasattr(loss, "row_fields"):
        raise InputError(
            f"{name}: {owner}.forward takes {' and '.join(taken)}, but {owner} does not declare row_fields; add "
            f"row_fields = {taken} to the class to receive them, or rename the parameters"
        )
    parts = [part for part in loss.modules() if hasattr(part, "is_stateful")]
    if "index" in declared and not parts:
        raise InputError(
            f"{name}: {owner} takes index, but does not declare is_stateful; add is_stateful = True and a method "
            "reset() if the loss stores values of each sample, else is_stateful = False"
        )
    for part in parts:
        if part.is_stateful and not isinstance(part, StatefulLoss):
            raise InputError(f"{name}: {type(part).__name__} is stateful, so it must have a method reset()")


def temperature_of(loss: nn.Module) -> float:
    """Return the temperature that a soft loss declares; 1 if it declares none."""
    return float(getattr(loss, "temperature", 1.0))


def standardizes(loss: nn.Module) -> bool:
    """Whether a soft loss declares that it standardizes the logits."""
    return bool(getattr(loss, "standardize", False))


def supports_top_k(loss: nn.Module) -> bool:
    """Whether a soft loss declares that the teacher's top k logits are enough."""
    return bool(getattr(loss, "supports_top_k", False))


def compares_rows(loss: nn.Module) -> bool:
    """Whether a soft loss declares that the value of a row depends on the other rows of the batch."""
    return bool(getattr(loss, "compares_rows", False))


def takes_target(loss: nn.Module) -> bool:
    """Whether a soft loss takes a third argument, the target. The losses of torch do not."""
    forward: Any = loss.forward
    return _takes_three(getattr(forward, "__func__", forward), inspect.ismethod(forward))


@lru_cache
def _takes_three(forward: Callable[..., Any], is_method: bool) -> bool:
    try:
        parameters = [*inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):
        return False
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return True
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in by_position for kind in kinds) - is_method > 2
