"""Distillation from a stronger teacher (DIST)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import (
    Reduction,
    Task,
    check_reduction,
    check_temperature,
    check_weight,
    pair_logits,
    reduce_rows,
)


class DISTLoss(nn.Module):
    r"""One minus the correlation of the student's and the teacher's probabilities, by sample and by class.

    With p = softmax(z / T), a (B, C) matrix, and rho Pearson's correlation:

    .. math:: T^2 \left(\beta \, \frac{1}{B} \sum_i \left(1 - \rho(p^s_{i,:}, p^t_{i,:})\right)
              + \gamma \, \frac{1}{C} \sum_j \left(1 - \rho(p^s_{:,j}, p^t_{:,j})\right)\right)

    The rows compare the classes of one sample, the columns compare the samples of the batch in one class. The loss has
    no unit and lies between 0 and 2 T² (beta + gamma). A row or column in which the teacher is constant (to rounding,
    by underflow, or since the batch has one sample) has no correlation and contributes 0. One in which only the
    student is constant contributes 1, without gradient.

    The columns depend on which samples share a batch. Several processes correlate within their own shares, so their
    loss differs from that of one process at the same global batch.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (2022), https://arxiv.org/abs/2205.10536.
    The defaults beta = gamma = 2 are common for CIFAR-100; they are not from the paper.

    Args:
        beta: Weight of the rows, at least 0.
        gamma: Weight of the columns, at least 0.
        temperature: T, finite and above 0. Every call reads it, so a callback may anneal it.
        reduction: "mean" (a scalar) or "none" (one value per row, the column term spread equally over the rows).

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or the logits' shapes differ.

    Example:
        >>> import torch
        >>> loss = DISTLoss(temperature=1.0)
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> loss(teacher, teacher)
        tensor(0.)
        >>> round(loss(teacher.flip(0), teacher).item(), 3)
        6.401
    """

    task: ClassVar[Task] = "multiclass"
    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = False
    compares_rows: ClassVar[bool] = True

    def __init__(
        self, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_weight("beta", beta)
        check_weight("gamma", gamma)
        check_temperature(temperature)
        check_reduction(reduction)
        self.beta = float(beta)
        self.gamma = float(gamma)
        self.temperature = float(temperature)
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        if not len(student):  # columns without rows have no largest entry
            return reduce_rows(student.sum(dim=1), self.reduction)
        student_log = F.log_softmax(student / self.temperature, dim=1)
        teacher_log = F.log_softmax(teacher / self.temperature, dim=1)
        rows = self.beta * _one_minus_pearson(student_log, teacher_log, dim=1)
        rows = rows + self.gamma * _one_minus_pearson(student_log, teacher_log, dim=0).mean()
        return reduce_rows(self.temperature**2 * rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}, reduction={self.reduction!r}"


def _one_minus_pearson(student_log: Tensor, teacher_log: Tensor, dim: int) -> Tensor:
    """1 - Pearson's correlation along ``dim`` of probabilities given by their logarithms."""
    student, student_constant = _standard_vector(student_log, dim)
    teacher, teacher_constant = _standard_vector(teacher_log, dim)
    teacher_constant = teacher_constant | (teacher_log.amax(dim) < math.log(torch.finfo(teacher_log.dtype).tiny))
    # Half the squared distance of two unit vectors is 1 minus their product, but exactly 0 at a perfect match.
    distance = (student - teacher).square().sum(dim) / 2
    return distance.masked_fill(student_constant, 1).masked_fill(teacher_constant, 0)


def _standard_vector(log_p: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return probabilities centred and scaled to length 1 along ``dim`` (0 where constant), and a mask of constants."""
    # Correlation ignores scale: division by the largest probability keeps tiny ones from underflow.
    p = (log_p - log_p.detach().amax(dim, keepdim=True)).exp()
    centred = p - p.mean(dim, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    rounding = 16 * torch.finfo(p.dtype).eps * torch.linalg.vector_norm(p, dim=dim, keepdim=True)
    constant = length <= rounding
    # Division by infinity gives zeros, and gradients of zero.
    return centred / length.masked_fill(constant, torch.inf), constant.squeeze(dim)
