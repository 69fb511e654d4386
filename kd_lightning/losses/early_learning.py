"""Early-learning regularisation, for labels that may be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, check_reduction, check_weight, log_probabilities, pick, reduce_rows


class EarlyLearningLoss(nn.Module):
    r"""Cross-entropy, and a pull towards what the network said of each sample before it learned wrong labels by heart.

    .. math:: -\log p_y + \lambda \log(1 - \langle p, t \rangle), \qquad t \leftarrow \beta t + (1 - \beta) \, p

    where t is each sample's running average of predictions, the current one included, without gradient. Networks learn
    what most labels agree on first; the second term, which falls as p agrees with t, keeps it.

    The averages are kept for each sample (index, C) while training, and are part of ``state_dict``. Several processes
    share them. In eval mode the loss is cross-entropy, and nothing is remembered.

    Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels" (2020); probabilities are
    clamped to [1e-4, 1 - 1e-4] as in its code, which takes lambda = 3, beta = 0.7 for CIFAR-10.

    Args:
        weight: lambda, at least 0.
        momentum: beta, in [0, 1).
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - index: (B,) which sample each row is; modules tell it where batches have one.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: An argument outside what is allowed above, shapes or labels that do not fit, or no index while
            training.
    """

    def __init__(self, weight: float = 3.0, momentum: float = 0.7, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_weight("weight", weight)
        if not 0.0 <= momentum < 1.0:
            raise InputError(f"momentum must lie in [0, 1), got {momentum}")
        check_reduction(reduction)
        self.weight = float(weight)
        self.momentum = float(momentum)
        self.reduction = reduction
        self.forget()

    def forget(self) -> None:
        """Begin anew, for other samples or another network."""
        # no buffer, which DDP would send around in every step
        self.memory = torch.zeros(0, 0)

    def forward(self, logits: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = log_probabilities(logits, target)
        rows = -pick(log_p, target)
        if self.training:
            if index is None:
                raise InputError(
                    "EarlyLearningLoss remembers samples, so batches need an index, as SemiSupervisedDataModule's have"
                )
            p = log_p.exp().clamp(1e-4, 1 - 1e-4)
            self._remember(index, p.detach())
            rows = rows + self.weight * (1 - (p * self.memory[index]).sum(dim=1)).log()
        return reduce_rows(rows, self.reduction)

    @torch.no_grad()
    def _remember(self, index: Tensor, p: Tensor) -> None:
        """Take in the predictions of all processes, (B, C)."""
        p = p / p.sum(dim=1, keepdim=True)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            index, p = (torch.cat(gather_all_tensors(part)) for part in (index, p))
        index = index.long()
        size = max(len(self.memory), int(index.max()) + 1 if len(index) else 0)
        if self.memory.shape != (size, p.shape[1]) or self.memory.device != p.device:
            memory = p.new_zeros(size, p.shape[1])
            memory[: len(self.memory)] = self.memory.to(memory) if self.memory.numel() else 0
            self.memory = memory
        # where a sample comes twice, its last row counts, on every process alike
        order = torch.arange(len(index), device=index.device)
        p = p[torch.zeros(size, dtype=torch.long, device=index.device).scatter_reduce(0, index, order, "amax")[index]]
        self.memory[index] = self.momentum * self.memory[index] + (1 - self.momentum) * p.to(self.memory.dtype)

    def get_extra_state(self) -> Tensor:
        """The averages, for ``state_dict``."""
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        """Go on with these averages."""
        self.memory = state.clone()

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"weight={self.weight}, momentum={self.momentum}, reduction={self.reduction!r}"
