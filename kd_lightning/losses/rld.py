"""Refined logit distillation (RLD)."""

from typing import ClassVar

import torch
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
)
from kd_lightning.losses.target_class import split_target, target_class


class RLDLoss(nn.Module):
    r"""Distillation without the classes that a teacher wrongly ranks above the true one.

    The student's true class learns the probability of the teacher's most likely class, whatever class this is. The
    other classes learn the teacher's relations among the classes with a logit below that of the true class. With
    p = softmax(z / T), y the true class, and p̂ the probabilities of these classes scaled to sum 1:

    .. math:: T^2 \left(\alpha \, \mathrm{KL}([\max p^t, 1 - \max p^t] \,\|\, [p^s_y, 1 - p^s_y])
              + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s)\right)

    in nats, averaged over the batch. If the teacher is right, the loss is :class:`DKDLoss`; if it ranks the true class
    last, the second term is 0.

    Source: Sun et al., "Knowledge Distillation with Refined Logits" (2024), https://arxiv.org/abs/2408.07703. The
    defaults are those of :class:`DKDLoss`. The authors' code adds the loss to cross-entropy of weight 1, and raises it
    linearly over the first 20 epochs; this class does not.

    Args:
        alpha: Weight of the first term, at least 0.
        beta: Weight of the second term, at least 0.
        temperature: T, finite and above 0. Every call reads it, so a callback may anneal it.
        confidence_temperature: T of the first term, as of the authors' code. Default: None, which means
            ``temperature``. (An ensemble is averaged at ``temperature``.)
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2. Half precision is computed in float32.
        - target: (B,), long, class indices or -100 for an unlabeled row; or probabilities (B, C), which mean the most
          likely class, or NaN. An unlabeled row takes the teacher's most likely class as its true class.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, the logits' shapes differ, or the target is missing or not (B,)
            long. A class index beyond C raises torch's own error, as in ``torch.nn.CrossEntropyLoss``.

    Example:
        >>> import torch
        >>> loss = RLDLoss(alpha=1.0, beta=2.0, temperature=1.0)
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> [round(loss(student, teacher, torch.tensor([label])).item(), 3) for label in (0, 1)]
        [0.451, 0.229]
    """

    task: ClassVar[Task] = "multiclass"
    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = False  # the order of all classes counts

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        check_temperature(temperature)
        if confidence_temperature is not None:
            check_temperature(confidence_temperature, "confidence_temperature")
        check_reduction(reduction)
        self.alpha = float(alpha)
        self.beta = float(beta)
        self.temperature = float(temperature)
        self.confidence_temperature = None if confidence_temperature is None else float(confidence_temperature)
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        temperature = self.temperature if self.confidence_temperature is None else self.confidence_temperature
        check_temperature(temperature, "confidence_temperature")
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        target = target_class("RLDLoss", target, teacher)
        student_true, _ = split_target(student / temperature, target)
        teacher_most, _ = split_target(teacher / temperature, teacher.argmax(dim=1, keepdim=True))
        rows = self.alpha * temperature**2 * kl_divergence(student_true, teacher_most)
        # Finite, so that no infinity enters the graph. A row without any class left has the same value everywhere.
        masked, lowest = teacher >= teacher.gather(1, target), torch.finfo(teacher.dtype).min / 2
        student_log, teacher_log = (
            (logits / self.temperature).masked_fill(masked, lowest).log_softmax(dim=1) for logits in (student, teacher)
        )
        rows = rows + self.beta * self.temperature**2 * kl_divergence(student_log, teacher_log)
        return reduce_rows(rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, "
            f"confidence_temperature={self.confidence_temperature}, reduction={self.reduction!r}"
        )
