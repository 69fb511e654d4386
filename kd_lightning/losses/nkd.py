"""Normalized knowledge distillation (NKD)."""

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.losses.base import (
    Reduction,
    Task,
    check_reduction,
    check_temperature,
    check_weight,
    gather_target,
    pair_logits,
    reduce_rows,
)
from kd_lightning.losses.target_class import split_target, target_class


class NKDLoss(nn.Module):
    r"""Cross-entropy of the target class, weighted by the teacher, and of the other classes, scaled to sum 1.

    With p = softmax(z), y the target class, and p̂ = softmax(z / T) over the other classes alone:

    .. math:: -p^t_y \log p^s_y - \gamma \, T^2 \sum_{k \neq y} \hat p^t_k \log \hat p^s_k

    in nats, averaged over the batch. The terms are cross-entropies, so the loss of equal logits is not 0: the first
    raises the student's probability of the target class to 1. With two classes the second term is 0.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels" (2023), https://arxiv.org/abs/2303.13005. It adds the loss to cross-entropy, both
    of weight 1: a soft_weight of 0.5 gives half of this sum.

    In an ensemble, the teachers are averaged at T; if T is not 1, the first term has the probability at temperature 1
    of this averaged teacher.

    Args:
        gamma: Weight of the other classes, at least 0.
        temperature: T of the second term, finite and above 0. Every call reads it, so a callback may anneal it.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2. Half precision is computed in float32.
        - target: (B,), long, class indices or -100 for an unlabeled row; or probabilities (B, C), which mean the most
          likely class, or NaN. An unlabeled row takes the teacher's most likely class as its target. (The paper has one
          class for each row.)
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, the logits' shapes differ, or the target is missing or not (B,)
            long. A class index beyond C raises torch's own error, as in ``torch.nn.CrossEntropyLoss``.

    Example:
        >>> import torch
        >>> loss = NKDLoss(gamma=1.5)
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(loss(student, teacher, torch.tensor([0])).item(), 3)
        1.771
    """

    task: ClassVar[Task] = "multiclass"
    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = True  # the classes outside the top k count as equally likely

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_weight("gamma", gamma)
        check_temperature(temperature)
        check_reduction(reduction)
        self.gamma = float(gamma)
        self.temperature = float(temperature)
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        target = target_class("NKDLoss", target, teacher)
        student_log, teacher_log = (gather_target(z.log_softmax(dim=1), target.squeeze(1)) for z in (student, teacher))
        _, student_others = split_target(student / self.temperature, target)
        _, teacher_others = split_target(teacher / self.temperature, target)
        others = (teacher_others.exp() * student_others).sum(dim=1)
        rows = -teacher_log.exp() * student_log - self.gamma * self.temperature**2 * others
        return reduce_rows(rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"gamma={self.gamma}, temperature={self.temperature}, reduction={self.reduction!r}"
