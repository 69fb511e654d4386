"""Distillation by the Jensen-Shannon divergence (JS)."""

import math
from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.losses.base import (
    Reduction,
    Task,
    check_reduction,
    check_task,
    check_temperature,
    kl_divergence,
    pair_logits,
    reduce_rows,
)
from kd_lightning.losses.kd import soften


class JSDLoss(nn.Module):
    r"""Jensen-Shannon divergence between the softened probabilities of teacher and student, times T².

    Multiclass, with p = softmax(z / T):

    .. math:: \tfrac{T^2}{2} \left(\mathrm{KL}(p^t \,\|\, m) + \mathrm{KL}(p^s \,\|\, m)\right),
              \qquad m = (p^t + p^s) / 2

    in nats, averaged over the batch. Binary and multilabel: the same between Bernoulli distributions of probability
    sigmoid(z / T), averaged over the logits of a row. It is the same if student and teacher change places, and at most
    T² log 2, so a sample on which the two differ much has a smaller gradient than with :class:`KDLoss`. Where they
    hardly differ, it is a quarter of KDLoss.

    Source: Lin, "Divergence Measures Based on the Shannon Entropy" (1991), https://doi.org/10.1109/18.61115.

    Args:
        temperature: T, finite and above 0. Every call reads it, so a callback may anneal it.
        task: "multiclass", "multilabel" or "binary".
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C) for multiclass, C >= 2; (B, L) for multilabel; (B,) or (B, 1) for
          binary, where the two may differ. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or the logits' shapes differ or do not fit the task.

    Example:
        >>> import torch
        >>> loss = JSDLoss(temperature=1.0)
        >>> far = torch.tensor([[50.0, -50.0]])
        >>> round(loss(far, -far).item(), 3)  # log 2
        0.693
    """

    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = False  # what is known of the other classes is their sum

    def __init__(self, temperature: float = 4.0, task: Task = "multiclass", reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_task(task)
        check_reduction(reduction)
        self.temperature = float(temperature)
        self.task = task
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        student, teacher = (soften(logits, self.temperature, self.task) for logits in (student, teacher))
        middle = student.logaddexp(teacher) - math.log(2)
        parts = (kl_divergence(middle, teacher) + kl_divergence(middle, student)) / 2
        rows = parts.unsqueeze(-1).flatten(1).mean(dim=1)
        return reduce_rows(self.temperature**2 * rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"temperature={self.temperature}, task={self.task!r}, reduction={self.reduction!r}"
