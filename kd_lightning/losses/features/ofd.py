"""The loss of "A Comprehensive Overhaul of Feature Distillation" (OFD)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.features.base import pair_positions


class OFDLoss(nn.Module):
    r"""The partial squared distance between features before their activation.

    .. math:: \sum_{c,i} \begin{cases} 0 & s_{c,i} \le t_{c,i} \le 0 \\ (t_{c,i} - s_{c,i})^2 & \text{else} \end{cases}

    over all channels c and positions i that count, averaged over the samples. Where the teacher is inactive, the
    student need not be exactly as far below 0. The loss grows with the size of the features and their number.

    The teacher's feature goes through a margin ReLU first: ``standardize=MarginReLU()`` of the term, see
    :class:`~kd_lightning.features.margin_relu.MarginReLU`. Layers are those before a ReLU, such as a batch norm. The
    authors' projector is a 1x1 convolution without bias, then a batch norm.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (ICCV 2019),
    https://arxiv.org/abs/1904.01866. The authors' weight is 0.001 for the last stage on CIFAR-100,
    and half as much at each stage before.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), the same shape. Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If the shapes differ.

    >>> import torch
    >>> OFDLoss()(torch.tensor([[-5.0, 1.0, 2.0]]), torch.tensor([[-1.0, -1.0, 4.0]]))  # 0 + 4 + 4
    tensor(8.)
    """

    needs_projector: ClassVar[bool] = True

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher, _ = pair_positions(student_feature, teacher_feature, batch)
        squares = (teacher - student).square().masked_fill((student <= teacher) & (teacher <= 0), 0)
        return squares.sum() / max(len(squares), 1)
