"""Relational knowledge distillation (RKD)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_weight
from kd_lightning.losses.features.base import pair_samples, unit_vectors
from kd_lightning.losses.products import products


class RKDLoss(nn.Module):
    r"""The difference of a batch's distances and angles between the student and the teacher.

    .. math:: \frac{w_d}{B^2} \sum_{i,j} h\left(d^s_{ij} - d^t_{ij}\right)
              + \frac{w_a}{B^3} \sum_{i,j,k} h\left(\cos\alpha^s_{ijk} - \cos\alpha^t_{ijk}\right)

    with h the smooth L1 distance; d the Euclidean distance of two samples' features, divided by the mean of all
    distances above 0; and alpha the angle at j between the directions to i and k. All entries of a sample's feature are
    one vector. Student and teacher may have any shapes. The loss has no unit, and ignores any shift, rotation and scale
    of both features. It is 0 for one sample. Two samples with equal features have the distance 0 and no direction, so
    that their cosines are 0.

    Both depend on which samples share a batch. Several processes compare within their own shares, so their loss differs
    from that of one process at the same global batch. Angles take memory for B² vectors of each network: use vectors,
    as by ``pool="mean"`` of a term, not maps.

    Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019), https://arxiv.org/abs/1904.05068. The paper's
    weights are 25 and 50 for classification (with a term's weight of 1), and 1 and 2 for metric learning.

    Args:
        distance_weight: w_d, the weight of the distances, finite and at least 0.
        angle_weight: w_a, the weight of the angles, finite and at least 0. Not both may be 0.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), of any shapes. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If a weight is out of range, or the numbers of samples differ.

    >>> import torch
    >>> triangle, line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    >>> loss = RKDLoss()
    >>> loss(4 * triangle, triangle), loss(line, triangle)
    (tensor(0.), tensor(8.2740))
    """

    needs_projector: ClassVar[bool] = False

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        check_weight("distance_weight", distance_weight)
        check_weight("angle_weight", angle_weight)
        if distance_weight == angle_weight == 0:
            raise InputError("distance_weight or angle_weight must be above 0, got 0 for both")
        self.distance_weight = float(distance_weight)
        self.angle_weight = float(angle_weight)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_samples(student_feature, teacher_feature, batch)
        loss = student.new_zeros(())
        if self.distance_weight:
            loss = loss + self.distance_weight * _difference(_distances(student), _distances(teacher))
        if self.angle_weight:
            loss = loss + self.angle_weight * _difference(_angles(student), _angles(teacher))
        return loss

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean smooth L1 distance; that of no entries is 0."""
    return F.smooth_l1_loss(student, teacher, reduction="sum") / max(student.numel(), 1)


def _distances(vectors: Tensor) -> Tensor:
    """Return the distances (B, B) of vectors (B, D), over the mean of those above 0."""
    # Not by products of vectors, whose rounding hides small distances. The gradient of a distance of 0 is 0.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.masked_fill(mean == 0, 1)


def _angles(vectors: Tensor) -> Tensor:
    """Return the cosines (B, B, B) of the angles at each vector (first dimension) between those to two others."""
    return products(unit_vectors(vectors.unsqueeze(0) - vectors.unsqueeze(1), dim=2))
