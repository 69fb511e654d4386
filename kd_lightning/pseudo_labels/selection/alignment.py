"""Distribution alignment: predictions whose classes have the shares that they should have."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection, SelectionAround, contains, known_classes
from kd_lightning.pseudo_labels.selection.open_set_filter import OpenSetFilter
from kd_lightning.pseudo_labels.selection.running_mean import RunningMean, mean_of_rows

Target = Literal["uniform", "labeled"]


class Alignment(nn.Module):
    r"""Scale probabilities by :math:`p_c \leftarrow p_c \, t_c / \tilde{p}_c`, and each row to sum 1.

    The running mean :math:`\tilde{p}` of the unlabeled rows starts at 1/C, as in the code of AdaMatch's authors, and
    moves before it is used. 1e-6 is added to both parts of the fraction.

    Args:
        target: t: ``"uniform"``, or ``"labeled"``, which means the running mean of the labeled rows' predictions.
        momentum: Of the running means, in [0, 1).
    """

    def __init__(self, target: Target, momentum: float) -> None:
        super().__init__()
        if target not in get_args(Target):
            raise InputError(f"target must be one of {', '.join(get_args(Target))}, got {target!r}")
        self.unlabeled = RunningMean(momentum)
        self.labeled = RunningMean(momentum) if target == "labeled" else None

    def start(self, num_classes: int) -> None:
        """Reset the running means."""
        for mean in (self.unlabeled, self.labeled):
            if mean is not None:
                mean.start(1 / num_classes, num_classes)

    def forward(self, probabilities: Tensor, labeled_probabilities: Tensor) -> Tensor:
        """Return the aligned probabilities, (U, C), of (U, C) and (L, C)."""
        found = self.unlabeled.update(*mean_of_rows(probabilities))
        wanted = torch.full_like(found, 1 / len(found))
        if self.labeled is not None:
            wanted = self.labeled.update(*mean_of_rows(labeled_probabilities))
        aligned = probabilities * ((wanted + 1e-6) / (found + 1e-6)).to(probabilities)
        return aligned / aligned.sum(dim=1, keepdim=True)


class DistributionAlignment(SelectionAround):
    """Align the probabilities, see :class:`Alignment`, before another selection gets them.

    It composes with any selection; ``OpenSetFilter`` must be outside. ``"uniform"`` is right if the pool has equally
    many samples of each class, ``"labeled"`` if its classes have the shares that they have among the labels. In
    ``PseudoLabelRefresh`` a step is a whole round: set ``momentum`` to 0, or near it.

    Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring",
    2020, https://arxiv.org/abs/1911.09785. It takes the shares of the labels themselves, and a mean over the last 128
    steps in place of the running one. The mean prediction of labeled rows is that of AdaMatch.

    Args:
        selection: The selection that gets the aligned probabilities.
        target: ``"uniform"`` or ``"labeled"``.
        momentum: Of the running means, in [0, 1).

    Raises:
        InputError: If an argument is out of range, ``OpenSetFilter`` is inside, or a selection inside aligns by itself.
    """

    def __init__(self, selection: Selection, target: Target = "uniform", momentum: float = 0.999) -> None:
        super().__init__(selection)
        if contains(selection, OpenSetFilter):
            raise InputError(
                "OpenSetFilter must be outside: OpenSetFilter(DistributionAlignment(...)) gets the probabilities as "
                "they are"
            )
        aligns = (one for one in selection.modules() if any(isinstance(part, Alignment) for part in one.children()))
        if (other := next(aligns, None)) is not None:
            raise InputError(
                f"DistributionAlignment: {type(other).__name__} inside aligns the probabilities, too; leave one of "
                "them out (AdaMatch and SoftMatch align by themselves; SoftMatch(align=False) does not)"
            )
        self.alignment = Alignment(target, momentum)
        self.needs_labeled = selection.needs_labeled or target == "labeled"

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state, see :class:`Selection`."""
        super().setup(num_samples, num_classes, num_unlabeled)
        classes = known_classes(self, num_classes)
        self.alignment.start(classes)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        aligned = self.alignment(probabilities, labeled_probabilities)
        selected: tuple[Tensor, Tensor] = self.selection(aligned, labeled_probabilities, index)
        return selected
