"""Attention transfer (AT)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.features.base import (
    mean_of_positions,
    pair_pooled,
    pair_rows,
    unit_vectors,
    without_padding,
)


class AttentionTransferLoss(nn.Module):
    r"""The squared distance between the attention maps of a student's and a teacher's feature.

    .. math:: \frac{1}{P} \sum_i \left(\frac{q^s_i}{\lVert q^s \rVert} - \frac{q^t_i}{\lVert q^t \rVert}\right)^2,
              \qquad q_i = \frac{1}{C} \sum_c a_{c,i}^2

    for features a of C channels at P positions, averaged over the samples. The attention map q shows where in a sample
    a network is active, so student and teacher may have other numbers of channels. The larger map is averaged to the
    size of the smaller one, along each side. Positions that do not count are 0 in the map, and not in the mean. The
    loss has no unit, lies between 0 and 2 / P, and ignores the scale of both features.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017),
    https://arxiv.org/abs/1612.03928, equation 2 with p = 2, as the squares in the authors' code. The paper's weight is
    1000, for each pair of layers.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), with 2 positions at least, and as many sides in both. Half
          precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the shapes do not fit.

    >>> import torch
    >>> AttentionTransferLoss()(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0], [0.0, 4.0]]]))
    tensor(1.)
    """

    needs_projector: ClassVar[bool] = False

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        features = pair_rows(student_feature, teacher_feature)
        squares, teacher_squares = (
            without_padding(feature, batch).square().mean(dim=1, keepdim=True) for feature in features
        )
        student, teacher, counted = pair_pooled(squares, teacher_squares, batch)
        if student.shape[2] < 2:
            raise InputError(
                f"attention maps need 2 positions or more, got features {[*student_feature.shape]} and "
                f"{[*teacher_feature.shape]}"
            )
        student, teacher = unit_vectors(student, dim=2), unit_vectors(teacher, dim=2)
        return mean_of_positions((student - teacher).square().squeeze(1), counted)
