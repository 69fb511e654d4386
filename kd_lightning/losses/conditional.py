"""Conditional teacher-student learning: the label where the teacher is wrong."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import class_labels, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, Task, check_reducible, check_reduction, pair_logits, reduce_rows
from kd_lightning.losses.protocols import compares_rows, standardizes, supports_top_k, takes_target, temperature_of


class ConditionalLoss(nn.Module):
    r"""A soft loss that learns from the label, and not from the teacher, where the teacher is wrong.

    .. math:: \ell_i = \begin{cases}
              w \, \mathrm{soft}_i + (1 - w) \, \mathrm{CE}(y_i, z^s_i) & \text{if the teacher is wrong on row } i \\
              \mathrm{soft}_i & \text{otherwise, and on rows without a label} \end{cases}

    for w = ``wrong_weight``, and the mean over all rows. CE is cross-entropy at temperature 1, in nats (binary
    cross-entropy for the binary task). The teacher is wrong on a labeled row if it holds another class more likely than
    the label; a tie counts as right. A label counts as right, whatever its kind is: a noisy label may make a right
    teacher wrong. The teacher's decision is that of the logits that the loss gets: in an ensemble of the averaged
    teachers, at the loss's temperature.

    At ``wrong_weight`` 1, and where the teacher is never wrong, it is the inner loss to the bit (on other devices than
    the CPU to rounding, since a device need not be waited for).

    Source: Meng et al., "Conditional Teacher-Student Learning" (ICASSP 2019), https://arxiv.org/abs/1904.12399, for
    w = 0. There the loss is the whole objective: ``soft_weight: 1.0``.

    Args:
        loss: The soft loss of the other rows, such as :class:`KDLoss`, with a ``reduction``. Its own reduction does not
            count. It must not compare the rows of a batch.
        wrong_weight: w, in [0, 1]. Every call reads it, so a callback may anneal it.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Attributes:
        temperature: That of the inner loss; 1 if it has none. A callback may anneal it, as ``soft_loss.temperature``.

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2; (B,) or (B, 1) for the binary task. Half precision is computed
          in float32.
        - target: (B,) class indices or -100 (NaN where they are floats) for an unlabeled row. For multiclass also
          probabilities (B, C), whose most likely class is the label that the teacher's decision is compared with, while
          cross-entropy is that of the probabilities; a row of NaN is unlabeled. For binary also (B, 1), probabilities,
          and (B, 2) probabilities of both classes.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range; if the inner loss is of another task than multiclass and binary, has
            no ``reduction``, or compares the rows of a batch; if the target is missing or shapes do not fit.

    Example:
        >>> import torch
        >>> from kd_lightning.losses import KDLoss
        >>> loss = ConditionalLoss(KDLoss(temperature=1.0), reduction="none")
        >>> student, teacher = torch.zeros(3, 2), torch.tensor([[2.0, 0.0]] * 3)
        >>> loss(student, teacher, torch.tensor([0, 1, -100]))  # KL where it is right, log 2, and KL
        tensor([0.3278, 0.6931, 0.3278])
    """

    def __init__(self, loss: nn.Module, wrong_weight: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise InputError(f"loss must be a soft loss, got {type(loss).__name__}")
        name = type(loss).__name__
        check_reducible("loss", loss)
        check_reduction(reduction)
        task: Any = getattr(loss, "task", "multiclass")
        if task not in (allowed := (get_args(Task)[0], get_args(Task)[2])):
            raise InputError(f"loss must be of a task with one decision a row, {' or '.join(allowed)}, got {task}")
        if compares_rows(loss):
            raise InputError(
                f"loss must have a value for each row alone, but {name} compares the rows of a batch, so that a wrong "
                "teacher would teach the other rows; use KDLoss, for example"
            )
        self.loss = loss
        self.task: Task = task
        self.wrong_weight = wrong_weight
        self.reduction = reduction
        self._check_weight()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        self._check_weight()
        if self.wrong_weight == 1:
            return self._soft(student_logits, teacher_logits, target, self.reduction)
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        binary = self.task == "binary"
        wrong, hard = (_binary if binary else _multiclass)(student, teacher, self._checked(target, student))
        if wrong.device.type == "cpu" and not wrong.any():
            return self._soft(student_logits, teacher_logits, target, self.reduction)
        soft = self._soft(student_logits, teacher_logits, target, "none")
        mixed = hard if self.wrong_weight == 0 else self.wrong_weight * soft + (1 - self.wrong_weight) * hard
        return reduce_rows(torch.where(wrong, mixed, soft), self.reduction)

    @property
    def temperature(self) -> float:
        """The temperature of the inner loss."""
        return temperature_of(self.loss)

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.loss.temperature = value  # type: ignore[assignment]

    @property
    def standardize(self) -> bool:
        """Whether the inner loss standardizes the logits. Those of the label's cross-entropy are as they are."""
        return standardizes(self.loss)

    @property
    def supports_top_k(self) -> bool:
        """Whether the teacher's top k logits are enough for the inner loss."""
        return supports_top_k(self.loss)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"wrong_weight={self.wrong_weight}, reduction={self.reduction!r}"

    def _check_weight(self) -> None:
        if not 0 <= self.wrong_weight <= 1:
            raise InputError(f"wrong_weight must lie in [0, 1], got {self.wrong_weight}")

    def _checked(self, target: Tensor | None, student: Tensor) -> Tensor:
        """Return a target that fits logits (B, C), or (B, 1) for binary, as (B,) or (B, C)."""
        if target is None:
            raise InputError("target must be given to ConditionalLoss, with -100 where there is no label, got None")
        shapes = [student.shape[:1], student.shape] if target.is_floating_point() else [student.shape[:1]]
        if self.task == "binary":
            rows = len(student)
            shapes = [student.shape[:1], student.shape] + ([(rows, 2)] if target.is_floating_point() else [])  # type: ignore[list-item]
        if target.shape not in shapes:
            allowed = " or ".join(str([*shape]) for shape in shapes)
            raise InputError(f"target must be of shape {allowed}, got {target.dtype} of shape {[*target.shape]}")
        return target

    def _soft(self, student: Tensor, teacher: Tensor, target: Tensor | None, reduction: Reduction) -> Tensor:
        """Return the inner loss: a scalar, or (B,) for reduction "none"."""
        loss: Any = self.loss
        before, loss.reduction = loss.reduction, reduction
        try:
            value: Tensor = loss(student, teacher, target) if takes_target(loss) else loss(student, teacher)
        finally:
            loss.reduction = before
        if reduction == "mean":
            return value
        if value.shape[:1] != student.shape[:1]:
            raise InputError(
                f"loss: {type(loss).__name__} with reduction 'none' must return one value for each row, "
                f"[{len(student)}], got {[*value.shape]}"
            )
        return value.unsqueeze(-1).flatten(1).mean(dim=1)  # torch's losses have a value for each class


def _multiclass(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the teacher is wrong, (B,), and the label's cross-entropy, (B,), 0 on unlabeled rows."""
    label = class_labels(target)
    known = is_labeled(label)
    label = torch.where(known, label, 0).long()
    wrong = known & (teacher.gather(1, label.unsqueeze(1)).squeeze(1) < teacher.amax(dim=1))
    if target.ndim == 1:
        return wrong, F.cross_entropy(student, label, reduction="none")
    shares = torch.where(known.unsqueeze(1), target, 0).to(student.dtype)
    return wrong, F.cross_entropy(student, shares, reduction="none")


def _binary(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for logits (B, 1)."""
    target = target[:, 1] if target.ndim == 2 and target.shape[1] == 2 else target.flatten()
    known = is_labeled(target)
    label = torch.where(known, target, 0).to(student.dtype)
    logits = teacher.flatten()
    wrong = known & torch.where(label > 0.5, logits < 0, logits > 0)
    return wrong, F.binary_cross_entropy_with_logits(student.flatten(), label, reduction="none")
