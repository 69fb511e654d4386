"""Variational information distillation (VID)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import at_least_float32
from kd_lightning.losses.features.base import mean_of_positions, pair_pooled

_LEAST_VARIANCE = 1e-5


class VIDLoss(nn.Module):
    r"""The negative log-likelihood of a teacher's feature under a normal distribution that the student predicts.

    .. math:: \frac{1}{C} \sum_c \frac{1}{2} \left(\frac{(t_{c,i} - \mu_c(s_i))^2}{\sigma_c^2}
              + \log \sigma_c^2\right), \qquad \sigma_c^2 = \log(1 + e^{\alpha_c}) + 10^{-5}

    for the teacher's C channels at position i, averaged over the positions of a sample that count, then over the
    samples. Its negative is a lower bound of the mutual information of the two layers, up to a constant. The mean mu is
    three 1x1 convolutions without bias and two ReLUs, with the teacher's number of channels in between. The variance of
    each channel is learned. Both train beside the student, and :meth:`build` makes them. The larger feature is averaged
    to the size of the smaller one, along each side. The loss is in nats, and may be below 0.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (CVPR 2019),
    https://arxiv.org/abs/1904.05835. The networks, the first variance of 5, and the weight 1 for
    each pair of layers are those of Tian et al. (https://arxiv.org/abs/1910.10699).

    Args:
        initial_variance: Variance at the start, in the square of the teacher's unit, finite and above 1e-5.

    Shape:
        - student_feature: (B, C_s, ...).
        - teacher_feature: (B, C, ...), with as many sides. The convolutions compute in the precision of training, the
          rest in at least float32.
        - output: scalar.

    Raises:
        InputError: If ``initial_variance`` is out of range, the shapes do not fit those of :meth:`build`, or it was not
            called.

    >>> import torch
    >>> loss = VIDLoss()
    >>> loss.build((4, 8, 8), (6, 8, 8), samples=None)
    >>> student, teacher = torch.zeros(2, 4, 8, 8), torch.zeros(2, 6, 8, 8)
    >>> loss(student, teacher)  # half the logarithm of the variance
    tensor(0.8047, grad_fn=<DivBackward0>)
    """

    needs_projector: ClassVar[bool] = False

    def __init__(self, initial_variance: float = 5.0) -> None:
        super().__init__()
        if not _LEAST_VARIANCE < initial_variance < math.inf:
            raise InputError(f"initial_variance must be finite and above {_LEAST_VARIANCE}, got {initial_variance}")
        self.initial_variance = float(initial_variance)

    def build(self, student: Sequence[int], teacher: Sequence[int], samples: int | None) -> None:
        """Make the convolutions and the variances.

        Args:
            student: Shape (C_s, ...) of the student's feature of one sample.
            teacher: Shape (C, ...) of the teacher's.
            samples: Not used.
        """
        channels, target = student[0], teacher[0]
        self.mean = nn.Sequential(
            nn.Conv1d(channels, target, 1, bias=False),
            nn.ReLU(),
            nn.Conv1d(target, target, 1, bias=False),
            nn.ReLU(),
            nn.Conv1d(target, target, 1, bias=False),
        )
        softplus = self.initial_variance - _LEAST_VARIANCE
        self.alpha = nn.Parameter(torch.full((target,), softplus + math.log(-math.expm1(-softplus))))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        if not hasattr(self, "mean"):
            raise InputError("VIDLoss has no parameters before build(student_shape, teacher_shape, samples)")
        student, teacher, counted = pair_pooled(student_feature, teacher_feature, batch)
        target, channels, _ = next(self.mean.parameters()).shape
        if (channels, target) != (student.shape[1], teacher.shape[1]):
            raise InputError(
                f"VIDLoss is built for {channels} and {target} channels, got {student.shape[1]} and {teacher.shape[1]}"
            )
        mean = at_least_float32(self.mean(student.to(self.alpha.dtype)))
        variance = F.softplus(at_least_float32(self.alpha)).unsqueeze(-1) + _LEAST_VARIANCE
        density = ((teacher - mean).square() / variance + variance.log()) / 2
        return mean_of_positions(density.mean(dim=1), counted)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"initial_variance={self.initial_variance}"
