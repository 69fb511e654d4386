"""The cosine distance between features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.features.base import mean_of_positions, pair_positions, unit_vectors


class CosineLoss(nn.Module):
    r"""One minus the cosine of the angle between a student's and a teacher's feature, at each position.

    .. math:: 1 - \frac{s_i \cdot t_i}{\lVert s_i \rVert \lVert t_i \rVert}

    for the channels :math:`s_i` and :math:`t_i` at position i, averaged over the positions of a sample that count, then
    over the samples. The loss has no unit, lies between 0 and 2, and ignores the lengths of both features. A teacher's
    feature of length 0 has no direction and contributes 0. A student's contributes 1, without gradient.

    Source: Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model" (CVPR 2024),
    https://arxiv.org/abs/2312.06709. There the weight is 1 for a picture's vector, and 0.9 for its map,
    beside a :class:`~kd_lightning.losses.SmoothL1FeatureLoss` of weight 0.1.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), the same shape. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the shapes differ.

    >>> import torch
    >>> CosineLoss()(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor(1.)
    """

    needs_projector: ClassVar[bool] = True

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher, counted = pair_positions(student_feature, teacher_feature, batch)
        student, teacher = unit_vectors(student, dim=1), unit_vectors(teacher, dim=1)
        # Half the squared distance of two unit vectors is 1 minus their product, but exactly 0 at a perfect match.
        distance = (student - teacher).square().sum(dim=1) / 2
        distance = distance.masked_fill((student == 0).all(dim=1), 1).masked_fill((teacher == 0).all(dim=1), 0)
        return mean_of_positions(distance, counted)
