"""Early-learning regularisation, for labels that may be wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from kd_lightning.errors import InputError
from kd_lightning.losses.base import (
    Reduction,
    check_reduction,
    check_weight,
    gather_target,
    log_probabilities,
    reduce_rows,
)
from kd_lightning.losses.protocols import RowField
from kd_lightning.ranks import is_distributed


class EarlyLearningLoss(nn.Module):
    r"""Early-learning regularisation (ELR): cross-entropy, and a term that holds early predictions.

    .. math:: -\log p_y + \lambda \log(1 - \langle p, t \rangle), \qquad t \leftarrow \beta t + (1 - \beta) \, p

    where t is the running average of each sample's predictions, the current one included, without gradient. Networks
    learn first what most labels agree on. The second term falls as p agrees with t, so it keeps the network from
    memorising wrong labels later.

    The loss stores the averages by sample (index, C) while it trains. They are part of ``state_dict``. Several
    processes share them. In eval mode the loss is cross-entropy and stores nothing.

    Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels" (2020),
    https://arxiv.org/abs/2007.00151. Probabilities are clamped to [1e-4, 1 - 1e-4] as in the authors' code, which
    takes lambda = 3 and beta = 0.7 for CIFAR-10.

    Args:
        weight: lambda, at least 0.
        momentum: beta, in [0, 1).
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - index: (B,) the sample of each row. Required in training mode.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, shapes or labels do not fit, or ``index`` is missing in training
            mode.
    """

    row_fields: ClassVar[tuple[RowField, ...]] = ("index",)
    is_stateful: ClassVar[bool] = True

    def __init__(self, weight: float = 3.0, momentum: float = 0.7, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_weight("weight", weight)
        if not 0.0 <= momentum < 1.0:
            raise InputError(f"momentum must lie in [0, 1), got {momentum}")
        check_reduction(reduction)
        self.weight = float(weight)
        self.momentum = float(momentum)
        self.reduction = reduction
        self.reset()

    def reset(self) -> None:
        """Delete the averages, for other samples or another network."""
        # No buffer: DDP would broadcast it in every step.
        self.averages = torch.zeros(0, 0)

    def forward(self, logits: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = log_probabilities(logits, target)
        rows = -gather_target(log_p, target)
        if self.training:
            if index is None:
                raise InputError(
                    "index is required by EarlyLearningLoss in training mode, got None; batches of "
                    "SemiSupervisedDataModule have it"
                )
            p = log_p.exp().clamp(1e-4, 1 - 1e-4)
            self._update(index, p.detach())
            rows = rows + self.weight * (1 - (p * self.averages[index]).sum(dim=1)).log()
        return reduce_rows(rows, self.reduction)

    @torch.no_grad()
    def _update(self, index: Tensor, p: Tensor) -> None:
        """Update the averages with the predictions (B, C) of all processes."""
        p = p / p.sum(dim=1, keepdim=True)
        if is_distributed():
            index, p = (torch.cat(gather_all_tensors(part)) for part in (index, p))
        index = index.long()
        size = max(len(self.averages), int(index.max()) + 1 if len(index) else 0)
        if self.averages.shape != (size, p.shape[1]) or self.averages.device != p.device:
            averages = p.new_zeros(size, p.shape[1])
            averages[: len(self.averages)] = self.averages.to(averages) if self.averages.numel() else 0
            self.averages = averages
        # If a sample comes twice, its last row counts, the same one on every process.
        order = torch.arange(len(index), device=index.device)
        p = p[torch.zeros(size, dtype=torch.long, device=index.device).scatter_reduce(0, index, order, "amax")[index]]
        self.averages[index] = self.momentum * self.averages[index] + (1 - self.momentum) * p.to(self.averages.dtype)

    def get_extra_state(self) -> Tensor:
        """Return the averages, for ``state_dict``."""
        return self.averages

    def set_extra_state(self, state: Any) -> None:
        """Restore the averages from ``state_dict``."""
        self.averages = state.clone()

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"weight={self.weight}, momentum={self.momentum}, reduction={self.reduction!r}"
