"""The smooth L1 distance between features."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.base import check_weight
from kd_lightning.losses.features.base import mean_of_positions, pair_positions


class SmoothL1FeatureLoss(nn.Module):
    r"""The smooth L1 distance between the entries of a student's and a teacher's feature.

    .. math:: \frac{1}{C} \sum_c h(s_{c,i} - t_{c,i}), \qquad
              h(d) = \begin{cases} d^2 / (2 \beta) & |d| < \beta \\ |d| - \beta / 2 & \text{else} \end{cases}

    for C channels at position i, averaged over the positions of a sample that count, then over the samples. The loss
    grows with the size of the features.

    Source: Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model" (CVPR 2024),
    https://arxiv.org/abs/2312.06709. There the weight is 0.1, beside a
    :class:`~kd_lightning.losses.CosineLoss` of weight 0.9.

    Args:
        beta: Distance from which the loss is linear, in the teacher's unit, finite and at least 0. For 0 the loss is
            the absolute distance.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), the same shape. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If ``beta`` is out of range, or the shapes differ.

    >>> import torch
    >>> SmoothL1FeatureLoss()(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(1.5000)
    """

    needs_projector: ClassVar[bool] = True

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        check_weight("beta", beta)
        self.beta = float(beta)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher, counted = pair_positions(student_feature, teacher_feature, batch)
        distance = F.smooth_l1_loss(student, teacher, reduction="none", beta=self.beta)
        return mean_of_positions(distance.mean(dim=1), counted)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"beta={self.beta}"
