"""The soft loss of the modules that learn from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses import ConditionalLoss, KDLoss
from kd_lightning.losses.base import Task, check_weight, standardize_logits
from kd_lightning.losses.protocols import is_own, standardizes, supports_top_k, takes_target, temperature_of
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.term_names import check_name
from kd_lightning.teachers.teacher import Teacher


class WeightedLoss(nn.Module):
    """A soft loss and its weight, which a callback may anneal: ``attribute: soft_loss.<name>.weight``.

    Args:
        weight: At least 0.
        loss: The loss.
    """

    def __init__(self, weight: float, loss: nn.Module) -> None:
        super().__init__()
        check_weight("weight", weight)
        self.weight = weight
        self.loss = loss


class SoftLosses(nn.ModuleDict):
    """A sum of soft losses by name: ``{name: (weight, loss)}``.

    Args:
        losses: Weight and loss by name.

    Raises:
        InputError: If there is none, a weight is below 0, or a name is taken.
    """

    def __init__(self, losses: Mapping[str, tuple[float, nn.Module]]) -> None:
        if not losses:
            raise InputError("soft_loss must name at least one loss, {name: (weight, loss)}, got none")
        parts = {}
        for name, part in losses.items():
            check_name("soft_loss", name)
            is_pair = isinstance(part, tuple | list) and len(part) == 2
            if not is_pair or not isinstance(part[0], int | float) or not isinstance(part[1], nn.Module):
                raise InputError(f"soft_loss.{name} must be (weight, loss), got {part!r}")
            try:
                parts[name] = WeightedLoss(*part)
            except InputError as error:
                raise InputError(f"soft_loss.{name}: {error}") from error
        super().__init__(parts)

    @property
    def temperature(self) -> float:
        """Temperature of the first loss, for the checks of its soft targets."""
        return temperature_of(self._first)

    @property
    def standardize(self) -> bool:
        """Whether the first loss standardizes the logits."""
        return standardizes(self._first)

    @property
    def _first(self) -> nn.Module:
        (_, first), *_ = soft_losses_of(self).values()
        return first


def soft_losses_of(soft_loss: nn.Module) -> dict[str, tuple[float, nn.Module]]:
    """Return weight and loss by name: those of a sum, or ``soft`` for a single one."""
    if not isinstance(soft_loss, SoftLosses):
        return {"soft": (1.0, soft_loss)}
    found: dict[str, tuple[float, nn.Module]] = {}
    for name, part in soft_loss.items():
        check_weight(f"soft_loss.{name}.weight", part.weight)  # type: ignore[arg-type]  # a callback may have set it
        found[name] = part.weight, part.loss  # type: ignore[assignment]
    return found


class _StandardizingStudent(nn.Module):
    """A soft loss for teachers that are standardized already: it standardizes the student's logits alone.

    Args:
        loss: A loss that declares ``standardize``.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = copy(loss)
        self.loss.standardize = False  # type: ignore[assignment]
        self.task = getattr(loss, "task", "multiclass")
        if hasattr(loss, "reduction"):
            self.reduction = loss.reduction

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """Return the loss."""
        if hasattr(self, "reduction"):
            self.loss.reduction = self.reduction
        return call_soft_loss(self.loss, standardize_logits(student.to(teacher.dtype)), teacher, target)


def standardizing_student(loss: nn.Module) -> nn.Module:
    """Return a loss that standardizes the student's logits, and takes the teacher's as they are.

    Args:
        loss: A loss that declares ``standardize``, or a conditional one around it, whose labels meet the logits as they
            are.
    """
    if isinstance(loss, ConditionalLoss):
        return ConditionalLoss(standardizing_student(loss.loss), loss.wrong_weight, loss.reduction)
    return _StandardizingStudent(loss)


def has_own_loss(soft_loss: nn.Module) -> bool:
    """Whether a soft loss, or one of a sum, is a project's own; it may compare outputs of two shapes."""
    return any(is_own(loss) for _, loss in soft_losses_of(soft_loss).values())


def soft_terms(
    soft_loss: nn.Module, soft_weight: float, value_of: Callable[[nn.Module], Tensor]
) -> dict[str, LossTerm]:
    """Return the soft terms: one for each loss of a sum, by its name.

    Args:
        soft_loss: A soft loss, or a sum of some.
        soft_weight: Weight of their sum.
        value_of: Returns the value of a loss.
    """
    losses = soft_losses_of(soft_loss).items()
    return {name: LossTerm(soft_weight * weight, value_of(loss)) for name, (weight, loss) in losses}


def make_soft_loss(
    soft_loss: nn.Module | Mapping[str, tuple[float, nn.Module]] | None,
    task: Task,
    teachers: Iterable[nn.Module | None] = (),
    temperature: float = 4.0,
) -> nn.Module:
    """Check a given soft loss, or make the default one.

    Args:
        soft_loss: The given loss, or a sum of some. If None, ``KDLoss`` of the task; ``MSELoss`` for regression.
        task: The module's task.
        teachers: The module's teachers.
        temperature: Temperature of the default loss, above 0.

    Raises:
        InputError: If the loss is of another task, or needs all logits while a teacher's cache holds its top k alone.
    """
    if soft_loss is None:
        soft_loss = nn.MSELoss() if task == "regression" else KDLoss(temperature=temperature, task=task)
    if not isinstance(soft_loss, nn.Module):
        if not isinstance(soft_loss, Mapping):
            raise InputError(f"soft_loss must be a loss, or a dict {{name: (weight, loss)}}, got {soft_loss!r}")
        soft_loss = SoftLosses(soft_loss)
    for _, loss in soft_losses_of(soft_loss).values():
        if getattr(loss, "task", task) != task:
            raise InputError(f"soft_loss is for the {loss.task} task, but the module's task is {task}")
        check_takes_logits(loss)
    check_top_k(soft_loss, teachers)
    return soft_loss


_OF_PROBABILITIES = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.BCELoss, nn.NLLLoss, nn.KLDivLoss)


def check_takes_logits(soft_loss: nn.Module) -> None:
    """Raise InputError for a loss of torch whose target is probabilities or classes, and for one between features."""
    if hasattr(soft_loss, "needs_projector"):
        raise InputError(
            f"soft_loss: {type(soft_loss).__name__} compares features; give it to a FeatureTerm, with layer '' for the "
            "outputs"
        )
    if type(soft_loss) in _OF_PROBABILITIES:
        raise InputError(
            f"soft_loss: {type(soft_loss).__name__} needs probabilities or classes as its target, but a soft loss gets "
            "logits of student and teacher; use KDLoss, or a loss of your own"
        )


def check_top_k(soft_loss: nn.Module, teachers: Iterable[nn.Module | None]) -> None:
    """Raise InputError if a soft loss needs all logits while a teacher's cache holds its top k alone."""
    top_k = any(isinstance(teacher, Teacher) and teacher.cache_top_k is not None for teacher in teachers)
    losses = [loss for _, loss in soft_losses_of(soft_loss).values() if not supports_top_k(loss)]
    if top_k and losses:
        raise InputError(
            f"soft_loss: {losses[0]} needs all logits, but a teacher's cache_top_k stores its highest ones alone; "
            "leave cache_top_k out, or use KDLoss or DKDLoss without standardize"
        )


def call_soft_loss(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    """Call a soft loss with the outputs of student and teacher, and with the target if it takes a third argument."""
    if teacher.shape != student.shape and teacher.numel() == student.numel() and not is_own(loss):
        teacher = teacher.reshape(student.shape)  # (B,) and (B, 1) of one output; torch's losses would broadcast
    if not student.numel():  # no position counts; the mean of torch's losses would be NaN
        return student.sum()
    value: Tensor = loss(student, teacher, target) if takes_target(loss) else loss(student, teacher)
    return value
