"""The mean squared distance between features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.features.base import mean_of_positions, pair_positions


class MSEFeatureLoss(nn.Module):
    r"""The mean squared distance between the entries of a student's and a teacher's feature.

    .. math:: \frac{1}{C} \sum_c (s_{c,i} - t_{c,i})^2

    for C channels at position i, averaged over the positions of a sample that count, then over the samples. The loss
    grows with the square of the features' size. Unlike :class:`~kd_lightning.losses.HintLoss`, it does not grow with
    their number of entries: for P positions that all count, it is 2 / (C P) of that loss.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (CVPR 2022),
    https://arxiv.org/abs/2203.14001. There the weight is 1.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), the same shape. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the shapes differ.

    >>> import torch
    >>> MSEFeatureLoss()(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor(12.5000)
    """

    needs_projector: ClassVar[bool] = True

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher, counted = pair_positions(student_feature, teacher_feature, batch)
        return mean_of_positions((student - teacher).square().mean(dim=1), counted)
