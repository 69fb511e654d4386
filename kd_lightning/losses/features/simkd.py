"""The loss of SimKD."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import at_least_float32
from kd_lightning.losses.features.base import mean_of_positions, pair_positions, pool_to


class SimKDLoss(nn.Module):
    r"""The mean squared distance between the projected map of a student and its teacher's, at the student's size.

    .. math:: \frac{1}{C P} \sum_{c, i} (s_{c,i} - \mathrm{pool}(t)_{c,i})^2

    for C channels at P positions, averaged over the samples. The teacher's map is averaged in equal areas where it is
    larger.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (CVPR 2022),
    https://arxiv.org/abs/2203.14001, equation 2. It is the paper's whole objective.

    Shape:
        - student_feature: (B, C, h, w), the output of the projector. Half precision is computed in float32.
        - teacher_feature: (B, C, H, W), H at least h and W at least w.
        - output: scalar.

    Raises:
        InputError: If the channels differ, or the student's map is larger.

    >>> import torch
    >>> SimKDLoss()(torch.zeros(1, 1, 1, 1), torch.tensor([[[[1.0, 5.0]]]]))
    tensor(9.)
    """

    needs_projector: ClassVar[bool] = False

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        mine, theirs = student_feature.shape, teacher_feature.shape
        if len(mine) != 4 or len(theirs) != 4 or mine[:2] != theirs[:2]:
            raise InputError(f"SimKD needs maps (B, C, H, W) of as many channels, got {[*mine]} and {[*theirs]}")
        if mine[2] > theirs[2] or mine[3] > theirs[3]:
            raise InputError(
                f"the student's map {[*mine[2:]]} must not be larger than the teacher's {[*theirs[2:]]}; set the "
                f"student's size: {[*theirs[2:]]}"
            )
        teacher_feature = pool_to(at_least_float32(teacher_feature), mine[2:])
        student, teacher, counted = pair_positions(student_feature, teacher_feature, batch)
        return mean_of_positions((student - teacher).square().mean(dim=1), counted)
