"""A threshold relative to the confidence on labeled rows, and aligned classes (AdaMatch)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.pseudo_labels.selection.alignment import Alignment
from kd_lightning.pseudo_labels.selection.base import Selection, check_share, known_classes, most_probable
from kd_lightning.pseudo_labels.selection.running_mean import mean_of_rows


class AdaMatch(Selection):
    """Accept the aligned class of each row whose probability is at least a share of that of labeled rows.

    The probabilities are aligned with those of the labeled rows, see :class:`DistributionAlignment`. The threshold is
    ``relative_threshold`` times the mean highest probability of the labeled rows of this step, over all processes. In a
    step without a labeled row, nothing is accepted: set ``labeled_batch_size``.

    Berthelot et al., "AdaMatch: A Unified Approach to Semi-Supervised Learning and Domain Adaptation", 2022,
    https://arxiv.org/abs/2106.04732. As in the authors' code, the target is the aligned class, and the labeled mean a
    running one; that of unlabeled rows is a running one, too, in place of one over the last 128 steps. The threshold is
    the paper's 0.9 (USB: 0.95). The paper's random interpolation of logits, and its loss on strong views of the labeled
    rows, change the student, not the selection, and are left out, as in USB.

    Args:
        relative_threshold: In [0, 1].
        momentum: Of the running means, in [0, 1).
    """

    needs_labeled = True

    def __init__(self, relative_threshold: float = 0.9, momentum: float = 0.999) -> None:
        super().__init__()
        check_share("relative_threshold", relative_threshold)
        self.relative_threshold = relative_threshold
        self.alignment = Alignment("labeled", momentum)

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state, see :class:`Selection`."""
        classes = known_classes(self, num_classes)
        self.alignment.start(classes)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, see :class:`Selection`."""
        confidence, _, target = most_probable(self.alignment(probabilities, labeled_probabilities))
        mean, count = mean_of_rows(labeled_probabilities.amax(dim=1))
        accepted = (confidence >= self.relative_threshold * mean) & (count > 0)
        return target, accepted.to(confidence)

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return f"relative_threshold={self.relative_threshold}, momentum={self.alignment.unlabeled.momentum}"
