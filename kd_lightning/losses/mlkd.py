"""Multi-level logit distillation (MLKD)."""

import statistics
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.errors import InputError
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
from kd_lightning.losses.products import products


class MLKDLoss(nn.Module):
    r"""The student learns the probabilities, the relations between samples, and those between classes.

    With the (B, C) matrix P = softmax(z / T), summed over several temperatures:

    .. math:: \sum_T \frac{T^2}{B} \sum_{i \in S} \mathrm{KL}(P^t_i \,\|\, P^s_i)
              + \frac{1}{B} \sum_{i \in S} \lVert (G^t - G^s)_i \rVert^2
              + \frac{1}{C} \sum_{k \in K} \lVert (M^t - M^s)_k \rVert^2

    where G = P Pᵀ compares the samples of the batch, and M = Pᵀ P the classes. S are the samples whose confidence (the
    teacher's largest probability) is at most the median of the batch; K are the classes whose sum of probabilities is
    at most the median of the classes.

    The relations depend on which samples share a batch, and on their number: without T², the third term grows with B²
    (the paper's batches have 64 samples). Several processes compare within their own shares. G needs memory for B²
    numbers, which is much where the rows are positions of dense outputs.

    Source: Jin, Wang, Lin, "Multi-Level Logit Distillation" (2023),
    https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html. All
    weights are 1 there. S and K are from the authors' code, where they multiply means, which only halves these. The
    code also trains on a second, strongly augmented view of each sample, twice as long; this class compares one view.

    In an ensemble, the teachers are averaged at the median of the temperatures, and the other temperatures are those of
    this averaged teacher.

    Args:
        temperatures: The values of T, each finite and above 0; at least one.
        instance_weight: Weight of the probabilities, at least 0.
        batch_weight: Weight of the relations between samples, at least 0.
        class_weight: Weight of the relations between classes, at least 0.
        reduction: "mean" (a scalar) or "none" (one value per row, the third term spread equally over the rows).

    Shape:
        - student_logits, teacher_logits: (B, C), C >= 2. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or the logits' shapes differ.

    Example:
        >>> import torch
        >>> loss = MLKDLoss(temperatures=[1.0])
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> loss(teacher, teacher)
        tensor(0.)
    """

    task: ClassVar[Task] = "multiclass"
    standardize: ClassVar[bool] = False
    supports_top_k: ClassVar[bool] = False
    compares_rows: ClassVar[bool] = True

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        instance_weight: float = 1.0,
        batch_weight: float = 1.0,
        class_weight: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if isinstance(temperatures, str) or not isinstance(temperatures, Sequence) or not temperatures:
            raise InputError(f"temperatures must be a list of numbers above 0, got {temperatures!r}")
        for temperature in temperatures:
            check_temperature(temperature, "each of temperatures")
        check_weight("instance_weight", instance_weight)
        check_weight("batch_weight", batch_weight)
        check_weight("class_weight", class_weight)
        check_reduction(reduction)
        self.temperatures = tuple(map(float, temperatures))
        self.instance_weight = float(instance_weight)
        self.batch_weight = float(batch_weight)
        self.class_weight = float(class_weight)
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        probabilities = teacher.softmax(dim=1)
        samples = _at_most_median(probabilities.amax(dim=1))
        classes = _at_most_median(probabilities.sum(dim=0))
        rows = student.new_zeros(len(student))
        for temperature in self.temperatures:
            log_s, log_t = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
            s, t = log_s.exp(), log_t.exp()
            single = self.instance_weight * temperature**2 * kl_divergence(log_s, log_t)
            batch = self.batch_weight * (products(t) - products(s)).square().sum(dim=1)
            between_classes = (products(t.T) - products(s.T)).square().sum(dim=1)
            rows = rows + samples * (single + batch) + self.class_weight * (classes * between_classes).mean()
        return reduce_rows(rows, self.reduction)

    @property
    def temperature(self) -> float:
        """The median of the temperatures, at which an ensemble averages its teachers."""
        return statistics.median(self.temperatures)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return (
            f"temperatures={self.temperatures}, instance_weight={self.instance_weight}, "
            f"batch_weight={self.batch_weight}, class_weight={self.class_weight}, reduction={self.reduction!r}"
        )


def _at_most_median(values: Tensor) -> Tensor:
    """Which of the values (N,) are at most their median (of an even number the lower one), as booleans (N,)."""
    return values <= values.median()
