"""The loss of ReviewKD."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.features.base import mean_of_positions, pair_features, pair_rows, pool

_LEVELS = (4, 2, 1)  # sides of the pooled maps


class ReviewLoss(nn.Module):
    r"""Hierarchical context loss (HCL): the mean squared error of two maps, and of both at coarser sizes.

    .. math:: \frac{\sum_l w_l \operatorname{MSE}(\operatorname{pool}_l(s), \operatorname{pool}_l(t))}{\sum_l w_l}

    The levels l are the whole map with weight 1, then the map averaged to 4, 2 and 1 areas along each side, with half
    the weight of the level before. Levels that are not smaller than the map, along its shortest side, are left out; a
    vector has the first one alone. Positions that do not count are neither in averages nor in means.

    It goes with :class:`~kd_lightning.features.ReviewFusion` as the projector, one loss for each stage.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review" (ReviewKD, CVPR 2021),
    https://arxiv.org/abs/2104.09044, section 3.3, with a warm-up over the first 20 epochs. The weight of the authors'
    scripts for CIFAR-100 is 0.6 to 8, by the pair of networks: 0.6 for ResNet-56 and 20, 5 for WRN-40-2 and 16-2. The
    teacher's features are those before their last activation, and the vector that is pooled for the classifier.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), the same shape. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the shapes differ.

    >>> ReviewLoss()(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    tensor(1.)
    """

    needs_projector: ClassVar[bool] = True

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_rows(*pair_features(student_feature, teacher_feature))
        difference = student - teacher  # pooling is linear
        sides = difference.shape[2:]
        sizes = [sides, *(torch.Size([level] * len(sides)) for level in _LEVELS if sides and level < min(sides))]
        value, total, weight = difference.new_zeros(()), 0.0, 1.0
        for size in sizes:
            pooled, counted = pool(difference, size, batch)
            squares = pooled.unsqueeze(-1).flatten(2).square().mean(dim=1)
            value, total = value + weight * mean_of_positions(squares, counted), total + weight
            weight /= 2
        return value / total
