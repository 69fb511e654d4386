"""Two thresholds for each label by itself: one for its presence, one for its absence (UPS)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection, check_share

Thresholds = float | Sequence[float]


class LabelThresholds(Selection):
    r"""Accept a label as 1 from probability ``positive`` on, and as 0 up to probability ``negative``.

    For the binary and the multilabel task, whose labels have a probability each. A label between both thresholds has
    weight 0. A threshold is one number, or a list of one for each label: rare labels seldom reach a high probability.

    Rizve et al., "In Defense of Pseudo-Labeling: An Uncertainty-Aware Pseudo-label Selection Framework for
    Semi-Supervised Learning", 2021, https://arxiv.org/abs/2101.06329, equation 2. They also limit the uncertainty of
    the predictions, and divide the loss by the number of accepted labels; here it is divided by that of all unlabeled
    ones, as in FixMatch.

    Args:
        positive: Lowest probability of a label that is accepted as 1, in [0, 1].
        negative: Highest probability of a label that is accepted as 0, in [0, 1], at most ``positive``. If both are
            0.5, all are accepted.

    >>> target, weight = LabelThresholds(0.9, 0.1)(torch.tensor([[0.95, 0.6, 0.05]]), torch.zeros(0, 3), None)
    >>> target.tolist(), weight.tolist()
    ([[1.0, 1.0, 0.0]], [[1.0, 0.0, 1.0]])
    """

    tasks = ("binary", "multilabel")
    positive: Tensor
    negative: Tensor

    def __init__(self, positive: Thresholds = 0.95, negative: Thresholds = 0.05) -> None:
        super().__init__()
        thresholds = {"positive": positive, "negative": negative}
        lists = {name: [value] if isinstance(value, int | float) else [*value] for name, value in thresholds.items()}
        for name, values in lists.items():
            for value in values:
                check_share(name, value)
            own = values[0] if isinstance(thresholds[name], int | float) else values
            self.register_buffer(name, torch.tensor(own), persistent=False)
        sizes = {len(values) for values in lists.values()} - {1}
        if len(sizes) > 1 or not all(lists.values()):
            raise InputError(f"positive and negative must have one threshold for each label, got {self.extra_repr()}")
        if (self.negative > self.positive).any():
            raise InputError(f"negative must be at most positive, got {self.extra_repr()}")

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Compare the number of thresholds with that of the labels."""
        if num_classes is not None:
            self._check(num_classes)

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights, (U, L) both, see :class:`Selection`."""
        self._check(probabilities.shape[1])
        positive, negative = self.positive.to(probabilities), self.negative.to(probabilities)
        is_positive = probabilities >= positive
        accepted = is_positive | (probabilities <= negative)
        present = torch.where(accepted, is_positive, probabilities >= 0.5)
        return present.to(probabilities), accepted.to(probabilities)

    def _check(self, labels: int) -> None:
        for name in ("positive", "negative"):
            threshold: Tensor = getattr(self, name)
            if threshold.ndim and len(threshold) != labels:
                raise InputError(f"{name} must be one number, or one for each of {labels} labels, got {len(threshold)}")

    def extra_repr(self) -> str:
        """Show the arguments in messages."""
        return ", ".join(f"{name}={_text(getattr(self, name))}" for name in ("positive", "negative"))


def _text(threshold: Tensor) -> str:
    values = [float(f"{value:.6g}") for value in threshold.reshape(-1).tolist()]
    return str(values if threshold.ndim else values[0])
