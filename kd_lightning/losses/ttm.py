"""Transformed teacher matching (TTM), and its weighted form (WTTM)."""

import math
from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, Task, check_reduction, kl_divergence, pair_logits, reduce_rows


class TTMLoss(nn.Module):
    r"""KL divergence from a power of the teacher's probabilities to the student's own, which have temperature 1.

    With p = softmax(z) and the exponent g, here called ``exponent``:

    .. math:: \mathrm{KL}(q \,\|\, p^s), \qquad q_k = (p^t_k)^g / \sum_j (p^t_j)^g

    in nats, averaged over the batch. q is the teacher's softmax at temperature 1 / g. :class:`KDLoss` softens both
    sides, and has a factor T²; here the teacher alone is softened, and there is no factor. At g = 1 both are the
    same loss at temperature 1.

    Source: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching" (2024),
    https://arxiv.org/abs/2402.11148. It adds the loss to cross-entropy of weight 1, with an exponent and a weight for
    each pair of networks: 0.1 and 45 for VGG-13 and VGG-8 on CIFAR-100. In the modules' objective,
    ``(1 - soft_weight) * hard + soft_weight * soft``, ``soft_loss={"ttm": (45.0, TTMLoss(0.1))}`` with a soft_weight of
    0.5 is half of the paper's sum. A single loss with a soft_weight of 45 / 46 is 1 / 46 of it: with SGD the learning
    rate must be as many times larger, and the weight decay smaller.

    In an ensemble, the teachers' q are averaged.

    Args:
        exponent: g, finite and above 0. Below 1 it softens. Every call reads it, so a callback may anneal it.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or the logits' shapes differ.

    Example:
        >>> import torch
        >>> loss = TTMLoss(exponent=0.5)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]])
        >>> round(loss(student, teacher).item(), 3)
        0.328
    """

    task: ClassVar[Task] = "multiclass"
    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = True  # the classes outside the top k count as equally likely

    def __init__(self, exponent: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_exponent(exponent)
        check_reduction(reduction)
        self.exponent = float(exponent)
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        transformed, _ = _transform(teacher, self.exponent)
        return reduce_rows(kl_divergence(student.log_softmax(dim=1), transformed), self.reduction)

    @property
    def temperature(self) -> float:
        """The teacher's temperature, 1 / g, at which an ensemble averages its teachers."""
        return 1 / self.exponent

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"exponent={self.exponent}, reduction={self.reduction!r}"


class WTTMLoss(TTMLoss):
    r""":class:`TTMLoss` with a weight for each sample, which is large where the teacher is uncertain.

    .. math:: U \, \mathrm{KL}(q \,\|\, p^s), \qquad U = \sum_j (p^t_j)^g

    in nats, averaged over the batch (and not divided by the sum of the weights). For g below 1, U lies between 1, for
    a certain teacher, and C^(1 - g), for one that is equally unsure of all classes. At g = 1 it is 1.

    Source: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching" (2024),
    https://arxiv.org/abs/2402.11148. It adds the loss to cross-entropy of weight 1, with an exponent and a weight for
    each pair of networks: 0.2 and 4 beside CRD for VGG-13 and VGG-8 on CIFAR-100. :class:`TTMLoss` has how such a
    weight fits the modules' objective.

    In an ensemble, the teachers' q are averaged, and U is that of the probabilities whose power is this average.

    Args:
        exponent: g, finite and above 0. Every call reads it, so a callback may anneal it.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or the logits' shapes differ.

    Example:
        >>> import torch
        >>> loss = WTTMLoss(exponent=0.5)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]])
        >>> round(loss(student, teacher).item(), 3)
        0.369
    """

    supports_top_k: ClassVar[bool] = False  # the weight depends on how the other classes differ

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        transformed, log_weight = _transform(teacher, self.exponent)
        rows = kl_divergence(student.log_softmax(dim=1), transformed)
        return reduce_rows(log_weight.exp() * rows, self.reduction)


def _check_exponent(exponent: float) -> None:
    if not 0 < exponent < math.inf:
        raise InputError(f"exponent must be finite and above 0, got {exponent}")


def _transform(teacher: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """Return log q, (B, C), and log U, (B,), of the teacher's logits (B, C)."""
    _check_exponent(exponent)  # a callback may have set it
    powers = exponent * teacher.log_softmax(dim=1)
    log_sum = powers.logsumexp(dim=1, keepdim=True)
    return powers - log_sum, log_sum.squeeze(1)
