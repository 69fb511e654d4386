"""The loss of hint training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, check_reduction, reduce_rows


class HintLoss(nn.Module):
    r"""Half the squared distance between a hint and the student's answer to it (Romero et al. 2014, equation 3).

    .. math:: \tfrac{1}{2} \lVert u - r(v) \rVert^2

    for a hint :math:`u` and a projector's output :math:`r(v)`: summed over all of a sample's entries, then averaged
    over the batch. It grows with the size of the maps. Computed in at least float32.

    Args:
        reduction: ``"mean"`` over the batch, or ``"none"``: (B,).

    Shape:
        - regressed, hint: (B, ...), the same.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: For an unknown reduction, or shapes that differ.

    >>> HintLoss()(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor(12.5000)
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, regressed: Tensor, hint: Tensor) -> Tensor:
        """The loss; hints are constants to it."""
        if regressed.shape != hint.shape:
            raise InputError(
                f"hint and regressed map must have one shape, got {[*hint.shape]} and {[*regressed.shape]}"
            )
        kind = torch.promote_types(regressed.dtype, torch.float32)
        distance = (hint.detach().to(kind) - regressed.to(kind)).square().unsqueeze(-1).flatten(1).sum(dim=1) / 2
        return reduce_rows(distance, self.reduction)
