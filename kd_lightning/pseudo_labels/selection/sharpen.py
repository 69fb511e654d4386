"""Soft targets in place of one class."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.adamatch import AdaMatch
from kd_lightning.pseudo_labels.selection.alignment import DistributionAlignment
from kd_lightning.pseudo_labels.selection.base import Selection, SelectionAround, contains


class Sharpen(SelectionAround):
    """Replace the target of another selection by sharpened probabilities, p^(1/T), scaled to sum 1.

    The other selection gives the weights, from the probabilities as they are. To sharpen aligned probabilities, put it
    inside: ``DistributionAlignment(Sharpen(...))``. The aligned targets of ``AdaMatch`` cannot be sharpened.

    ``Sharpen(FixedThreshold(0.8), 0.4)`` is the rule of UDA (Xie et al. 2020, https://arxiv.org/abs/1904.12848), and
    ``Sharpen(FixedThreshold(0), 0.5)`` that of MixMatch (Berthelot et al. 2019, https://arxiv.org/abs/1905.02249).

    Args:
        selection: The selection that gives the weights.
        temperature: T, in (0, 1]. 1 means the probabilities themselves.

    Raises:
        InputError: If the temperature is out of range, or ``DistributionAlignment``, ``AdaMatch`` or another
            ``Sharpen`` is inside.

    >>> from kd_lightning.pseudo_labels.selection import FixedThreshold
    >>> Sharpen(FixedThreshold(0), 0.5)(torch.tensor([[0.75, 0.25]]), torch.zeros(0, 2), None)[0]
    tensor([[0.9000, 0.1000]])
    """

    def __init__(self, selection: Selection, temperature: float = 0.5) -> None:
        super().__init__(selection)
        if not 0.0 < temperature <= 1.0:
            raise InputError(f"temperature must lie in (0, 1], got {temperature}")
        if contains(selection, DistributionAlignment):
            raise InputError("Sharpen must be inside: DistributionAlignment(Sharpen(...)) sharpens what is aligned")
        if contains(selection, AdaMatch):
            raise InputError(
                "Sharpen would replace the aligned targets of AdaMatch by probabilities that are not aligned; leave it "
                "out, or take DistributionAlignment(Sharpen(...), 'labeled')"
            )
        if contains(selection, Sharpen):
            raise InputError("Sharpen in Sharpen: the inner one would have no effect; leave out one of them")
        self.temperature = temperature

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        _, weight = self.selection(probabilities, labeled_probabilities, index)
        # in log space: high powers of small probabilities underflow to 0
        return (probabilities.log() / self.temperature).softmax(dim=1), weight

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"temperature={self.temperature}"
