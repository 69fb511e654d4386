"""Probabilistic knowledge transfer (PKT)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.features.base import pair_samples, unit_vectors
from kd_lightning.losses.products import products

_EPSILON = 1e-7  # as in the authors' code; keeps the logarithm finite at opposite features


class PKTLoss(nn.Module):
    r"""The KL divergence between the neighbours of a batch's samples in the student and in the teacher.

    .. math:: \frac{1}{B^2} \sum_{i,j} p^t_{j|i} \log \frac{p^t_{j|i}}{p^s_{j|i}}, \qquad
              p_{j|i} = \frac{k_{ij}}{\sum_{j'} k_{ij'}}, \qquad k_{ij} = \tfrac{1}{2} (\cos(a_i, a_j) + 1)

    for the features a, with all entries of a sample in one vector. Student and teacher may have any shapes. The loss is
    in nats, and ignores any rotation of the features and the length of each one. It is 0 for one sample. As in the
    authors' code, the sums include i = j, and 1e-7 is added to both probabilities in the logarithm.

    The probabilities depend on which samples share a batch. Several processes compare within their own shares, so their
    loss differs from that of one process at the same global batch.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV 2018),
    https://arxiv.org/abs/1803.10837. Tian et al. (https://arxiv.org/abs/1910.10699) use the weight 30000 for CIFAR-100,
    for the vectors before the classifier.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), of any shapes. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the numbers of samples differ.

    >>> import torch
    >>> loss = PKTLoss()
    >>> loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor(0.0283)
    """

    needs_projector: ClassVar[bool] = False

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = map(_neighbours, pair_samples(student_feature, teacher_feature, batch))
        divergence = teacher * ((teacher + _EPSILON) / (student + _EPSILON)).log()
        return divergence.sum() / max(divergence.numel(), 1)


def _neighbours(vectors: Tensor) -> Tensor:
    """Return the probability (B, B) that each sample (row) picks each one (column) as its neighbour."""
    kernel = (products(unit_vectors(vectors, dim=1)) + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)
