"""Similarity-preserving distillation (SP)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.features.base import pair_samples, unit_vectors
from kd_lightning.losses.products import products


class SimilarityPreservingLoss(nn.Module):
    r"""The squared distance between the similarities of a batch's samples in the student and in the teacher.

    .. math:: \frac{1}{B^2} \lVert \tilde G^s - \tilde G^t \rVert_F^2, \qquad
              \tilde G_{i,:} = \frac{G_{i,:}}{\lVert G_{i,:} \rVert}, \qquad G = A A^\top

    for the features A, with all entries of a sample in one row. Student and teacher may have any shapes. The loss has
    no unit, lies between 0 and 4 / B, and ignores the scale and any rotation of both features. It is 0 for one sample.
    A sample whose feature is 0 has no similarities: its row is 0.

    The similarities depend on which samples share a batch. Several processes compare within their own shares, so their
    loss differs from that of one process at the same global batch.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019),
    https://arxiv.org/abs/1907.09682. The paper's weight is 3000, for a network's last map.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), of any shapes. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the numbers of samples differ.

    >>> import torch
    >>> loss = SimilarityPreservingLoss()
    >>> loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor(0.2929)
    """

    needs_projector: ClassVar[bool] = False

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_samples(student_feature, teacher_feature, batch)
        student, teacher = (unit_vectors(products(vectors), dim=1) for vectors in (student, teacher))
        return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1)
