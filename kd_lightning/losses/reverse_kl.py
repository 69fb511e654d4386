"""Distillation by the reverse KL divergence."""

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


class ReverseKLLoss(nn.Module):
    r"""KL divergence from the student's softened probabilities to the teacher's, times T².

    Multiclass, with p = softmax(z / T):

    .. math:: T^2 \, \mathrm{KL}(p^s \,\|\, p^t) = T^2 \sum_k p^s_k (\log p^s_k - \log p^t_k)

    in nats, averaged over the batch. Binary and multilabel: the same between Bernoulli distributions of probability
    sigmoid(z / T), averaged over the logits of a row. :class:`KDLoss` has the two in the other order: it makes a small
    student cover all classes that the teacher holds possible. This loss makes the student avoid the classes that the
    teacher holds impossible, and may leave out some that are possible.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (2023),
    https://arxiv.org/abs/2306.08543, which minimises it over sequences of tokens, without T².

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
        >>> loss = ReverseKLLoss(temperature=1.0)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]])
        >>> round(loss(student, teacher).item(), 3)
        1.325
    """

    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = False  # the least likely classes count most

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
        rows = kl_divergence(teacher, student).unsqueeze(-1).flatten(1).mean(dim=1)
        return reduce_rows(self.temperature**2 * rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"temperature={self.temperature}, task={self.task!r}, reduction={self.reduction!r}"
