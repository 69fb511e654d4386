"""A threshold for each class, which follows how well the class is learned (FlexMatch)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection, check_share, most_probable
from kd_lightning.ranks import gather_rows


class FlexMatch(Selection):
    r"""Accept a class from a threshold on that is low while the network is seldom sure of this class.

    Let :math:`\sigma_c` be the number of unlabeled samples whose last confident prediction (at least ``threshold``) is
    class c, and N that of all unlabeled samples:

    .. math:: \tau_c = \tau \frac{\beta_c}{2 - \beta_c}, \qquad
              \beta_c = \frac{\sigma_c}{\max(\max_k \sigma_k, N - \sum_k \sigma_k)}

    At first every threshold is 0. The thresholds of a step are those after the step before, as in the authors' code.
    It needs an index of each sample, and so a datamodule such as ``SemiSupervisedDataModule``.

    Zhang et al., "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling", 2021,
    https://arxiv.org/abs/2110.08263.

    Args:
        threshold: Highest threshold tau, in [0, 1].

    Attributes:
        last_class: Class of the last confident prediction by index, (samples,); -1 if there was none.
        num_unlabeled: N, ().
    """

    needs_index = True
    last_class: Tensor
    num_unlabeled: Tensor

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        check_share("threshold", threshold)
        self.threshold = threshold
        self.register_buffer("last_class", torch.zeros(0, dtype=torch.long))
        self.register_buffer("num_unlabeled", torch.zeros(0, dtype=torch.long))

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state, see :class:`Selection`."""
        if num_samples is None or num_unlabeled is None:
            raise InputError(
                "FlexMatch needs a datamodule with unlabeled_indices() and visible_labels(), and batches with an "
                "index, as SemiSupervisedDataModule's"
            )
        self.last_class = self.last_class.new_full((num_samples,), -1)
        self.num_unlabeled = self.num_unlabeled.new_tensor(num_unlabeled)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        if index is None:
            raise InputError("FlexMatch needs batches with an index, as SemiSupervisedDataModule's")
        if not self.num_unlabeled.numel():
            raise InputError("FlexMatch is not set up; call setup(...), as a fit does")
        confidence, label, target = most_probable(probabilities)
        weight = (confidence >= self.thresholds(probabilities.shape[1]).to(confidence)[label]).to(confidence)
        confident = torch.where(confidence >= self.threshold, label, -1)
        self._store(*gather_rows(torch.stack([index.to(label), confident], dim=1)).unbind(dim=1))
        return target, weight

    def thresholds(self, classes: int) -> Tensor:
        """Return the threshold of each class, (C,) float32, for ``classes`` = C."""
        ones = torch.ones_like(self.last_class)  # whole numbers: a sum of ones in float32 ends at 2^24
        counts = ones.new_zeros(classes + 1).scatter_add(0, self.last_class + 1, ones)[1:]
        beta = counts / torch.maximum(counts.max(), self.num_unlabeled - counts.sum()).clamp_min(1)
        return self.threshold * beta / (2 - beta)

    def _store(self, index: Tensor, label: Tensor) -> None:
        """Store confident predictions: samples (N,) and classes (N,), -1 for a sample without one.

        If a sample comes twice, the last of them counts, on every process.
        """
        rows = torch.where(label >= 0, torch.arange(len(label), device=label.device), -1)
        last = torch.full_like(self.last_class, -1).scatter_reduce(0, index, rows, "amax")[index]
        # all rows of a sample write the same class
        self.last_class[index] = torch.where(last >= 0, label[last], self.last_class[index])

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"threshold={self.threshold}"
