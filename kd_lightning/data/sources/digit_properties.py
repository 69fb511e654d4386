"""scikit-learn's handwritten digits with several labels each."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.data.sources.digits import Digits
from kd_lightning.data.sources.source import Parts


class DigitProperties(Digits):
    """The :class:`Digits` for the multilabel task: each has the labels ``even``, ``prime`` and ``above 4``, 0 or 1."""

    def load(self) -> Parts:
        """Load 1197 training and 600 test images."""
        parts = super().load()
        train, test = parts.train, parts.test
        assert test is not None
        return parts._replace(
            train=train._replace(targets=_properties(train.targets)),
            test=test._replace(targets=_properties(test.targets)),
            class_names=["even", "prime", "above 4"],
        )


def _properties(numbers: Tensor) -> Tensor:
    """Return the labels (N, 3) of digits (N,)."""
    prime = torch.isin(numbers, torch.tensor([2, 3, 5, 7]))
    return torch.stack([numbers % 2 == 0, prime, numbers > 4], dim=1).long()
