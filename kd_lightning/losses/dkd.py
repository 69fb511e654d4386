"""Decoupled knowledge distillation (DKD)."""

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.losses.base import (
    Reduction,
    Task,
    check_reduction,
    check_temperature,
    check_weight,
    kl_divergence,
    pair_logits,
    reduce_rows,
    standardize_logits,
)
from kd_lightning.losses.target_class import split_target, target_class


class DKDLoss(nn.Module):
    r"""The KL divergence of KD, split into a term for the target class and a term for the other classes.

    With p = softmax(z / T), y the target class, and p̂ the probabilities of the other classes scaled to sum 1:

    .. math:: T^2 \left(\alpha \, \mathrm{KL}([p^t_y, 1 - p^t_y] \,\|\, [p^s_y, 1 - p^s_y])
              + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s)\right)

    in nats, averaged over the batch. :class:`KDLoss` is the special case alpha = 1, beta = 1 - p^t_y: there a certain
    teacher gives the other classes little weight. With two classes the second term is 0.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (2022), https://arxiv.org/abs/2203.08679. Its beta depends
    on the pair of networks (8 for many, 2 for a weak teacher). It also raises the loss linearly over the first 20
    epochs; this class does not. ``standardize``: Sun et al., "Logit Standardization in Knowledge Distillation" (2024),
    https://arxiv.org/abs/2403.01427.

    Args:
        alpha: Weight of the target-class term, at least 0.
        beta: Weight of the term among the other classes, at least 0.
        temperature: T, finite and above 0. Every call reads it, so a callback may anneal it.
        reduction: "mean" (a scalar) or "none" (one value per row).
        standardize: Replace both sides' logits by (z - mean) / (1e-7 + std) per sample, as in :class:`KDLoss`.

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
        >>> loss = DKDLoss(alpha=1.0, beta=2.0, temperature=1.0)
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(loss(student, teacher, torch.tensor([0])).item(), 3)
        0.451
    """

    task: ClassVar[Task] = "multiclass"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        reduction: Reduction = "mean",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        check_temperature(temperature)
        check_reduction(reduction)
        self.alpha = float(alpha)
        self.beta = float(beta)
        self.temperature = float(temperature)
        self.reduction = reduction
        self.standardize = standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        target = target_class("DKDLoss", target, teacher)
        if self.standardize:
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        student_target, student_others = split_target(student / self.temperature, target)
        teacher_target, teacher_others = split_target(teacher / self.temperature, target)
        rows = self.alpha * kl_divergence(student_target, teacher_target)
        rows = rows + self.beta * kl_divergence(student_others, teacher_others)
        return reduce_rows(self.temperature**2 * rows, self.reduction)

    @property
    def supports_top_k(self) -> bool:
        """Whether top k logits are enough: yes, unless all must be standardized. The others count as equally likely."""
        return not self.standardize

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, reduction={self.reduction!r}, "
            f"standardize={self.standardize}"
        )
