"""The most probable pseudo-labels of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection, check_share, most_probable
from kd_lightning.ranks import gather_rows, own_rows


class TopKPerClass(Selection):
    """Accept the k most probable pseudo-labels of each class, so that no class has many more than another.

    In ``PseudoLabelRefresh`` these are the k of the pool; in ``PseudoLabelModule`` the k of each step, over all
    processes. Of equally probable ones, those with the lowest index are accepted; without an index, the first rows.

    Source: the class-balanced self-training of Zou et al., "Domain Adaptation for Semantic Segmentation via
    Class-Balanced Self-Training", 2018, https://arxiv.org/abs/1810.07911, with one number for all classes.

    Args:
        k: Number of accepted pseudo-labels of each class, at least 1.
        threshold: Lowest probability of an accepted one, in [0, 1].

    >>> rule = TopKPerClass(1)
    >>> rule(torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.4, 0.6]]), torch.zeros(0, 2), None)[1].tolist()
    [0.0, 1.0, 1.0]
    """

    def __init__(self, k: int, threshold: float = 0.0) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k must be an integer of at least 1, got {k}")
        check_share("threshold", threshold)
        self.k = k
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        confidence, label, target = most_probable(probabilities)
        every, labels = gather_rows(confidence), gather_rows(label)
        rows = torch.arange(len(every), device=every.device)
        order = rows if index is None else gather_rows(index).argsort(stable=True)
        order = order[every[order].argsort(descending=True, stable=True)]
        order = order[labels[order].argsort(stable=True)]  # by class, then by probability, then by index
        classes = labels[order].contiguous()
        first = torch.searchsorted(classes, classes)  # where the class of each row begins
        place = torch.empty_like(order)
        place[order] = rows - first
        accepted = (place[own_rows(confidence)] < self.k) & (confidence >= self.threshold)
        return target, accepted.to(confidence)

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"k={self.k}, threshold={self.threshold}"
