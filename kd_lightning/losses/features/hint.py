"""The loss of hint training (FitNets)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.losses.base import Reduction, check_reduction, reduce_rows
from kd_lightning.losses.features.base import pair_positions


class HintLoss(nn.Module):
    r"""Half the squared distance between a projected student feature and the teacher's hint.

    .. math:: \tfrac{1}{2} \lVert u - r(v) \rVert^2

    for a hint :math:`u` and a projector's output :math:`r(v)`, summed over all entries of a sample at positions that
    count, then averaged over the batch. The loss grows with the size of the features. The hint gets no gradient.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2014), https://arxiv.org/abs/1412.6550, equation 3.

    Args:
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - projected, hint: (B, C, ...), the same shape. Half precision is computed in float32.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If the reduction is unknown, or the shapes differ.

    >>> import torch
    >>> HintLoss()(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor(12.5000)
    """

    needs_projector: ClassVar[bool] = True

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, projected: Tensor, hint: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher, _ = pair_positions(projected, hint, batch)
        distance = (teacher - student).square().flatten(1).sum(dim=1) / 2
        return reduce_rows(distance, self.reduction)
