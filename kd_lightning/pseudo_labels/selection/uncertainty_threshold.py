"""A limit for the spread of a sample's predictions over views (UPS)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.base import Selection


class UncertaintyThreshold(Selection):
    r"""Accept a value if the standard deviation of its predictions over the views of the sample is low.

    For the regression task. The pseudo-label is the mean :math:`\mu` over the V views. It counts if

    .. math:: \sqrt{\frac{1}{V - 1} \sum_{v=1}^V (\hat y_v - \mu)^2} \le \text{limit}

    in units of the standard deviation of the given labels, each output by itself.

    Sources: Rizve et al., "In Defense of Pseudo-Labeling: An Uncertainty-Aware Pseudo-label Selection Framework for
    Semi-Supervised Learning", 2021, https://arxiv.org/abs/2101.06329, equation 4, for the limit of an uncertainty that
    is a standard deviation over passes; there the passes differ by dropout. Dai et al., "Semi-Supervised Deep
    Regression with Uncertainty Consistency and Variational Model Ensembling via Bayesian Neural Networks", 2023,
    https://arxiv.org/abs/2302.07579, for the mean over passes as target in regression; they weight values by a
    predicted variance in place of a limit.

    Args:
        limit: Highest spread of a value that is accepted, above 0, in standard deviations of the given labels.
            Infinity accepts all.

    >>> views = torch.tensor([[[1.0], [1.2]], [[1.0], [2.0]]])  # two samples, two views, one output
    >>> target, weight = UncertaintyThreshold(0.2)(views, views[:0], None)
    >>> target.flatten().tolist(), weight.flatten().tolist()
    ([1.100000023841858, 1.5], [1.0, 0.0])
    """

    tasks = ("regression",)

    def __init__(self, limit: float = 0.3) -> None:
        super().__init__()
        if not limit > 0:
            raise InputError(f"limit must be above 0, in standard deviations of the given labels, got {limit}")
        self.limit = limit

    @torch.no_grad()
    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return targets and weights (U, D) of predictions (U, V, D), see :class:`Selection`."""
        weight = spread_over_views(probabilities) <= self.limit
        return probabilities.mean(dim=1), weight.to(probabilities)

    def extra_repr(self) -> str:
        """Show the argument in messages."""
        return f"limit={self.limit}"


def spread_over_views(predictions: Tensor) -> Tensor:
    """Return the sample standard deviation of predictions (N, V, D) over their V views, (N, D); V is at least 2."""
    return predictions.std(dim=1) if len(predictions) else predictions[:, 0]
