"""Pseudo-labels of the binary and the multilabel task: labels 0 or 1, each by itself."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import IGNORE_INDEX, Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.label_thresholds import LabelThresholds
from kd_lightning.pseudo_labels.table import PoolLabels, PseudoLabels, check_classes
from kd_lightning.pseudo_labels.tasks.base import Select, columns
from kd_lightning.pseudo_labels.tasks.separate_labels import SeparateLabelsTask


class BinaryLabelsTask(SeparateLabelsTask):
    """One label 0 or 1 a sample (binary), or L of them (multilabel), each of which is given or not.

    Predictions are the probabilities of a 1, (N, L).
    """

    def __init__(self, name: Literal["binary", "multilabel"]) -> None:
        super().__init__(name)

    @property
    def num_outputs(self) -> int | None:
        """1 for the binary task, whose classes may have two names."""
        return 1 if self.name == "binary" else None

    def accept_all(self) -> LabelThresholds:
        """Return a selection that accepts each pseudo-label."""
        return LabelThresholds(0.5, 0.5)

    def rows(self, outputs: Tensor, network: str) -> Tensor:
        """Return a network's outputs as (N, L); InputError names the network if they have another shape."""
        if self.name == "binary" and outputs.shape[1:] in ((), (1,)):
            return outputs.reshape(-1, 1)
        if self.name == "binary" or outputs.ndim != 2:
            shape = "(B,) or (B, 1)" if self.name == "binary" else "(B, L)"
            raise InputError(f"{network} must give logits {shape}, got {[*outputs.shape]}")
        return outputs

    def predictions(self, outputs: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the probabilities of a 1, (N, L)."""
        return outputs.sigmoid()

    def confidence(self, predictions: Tensor) -> Tensor:
        """Return the probability of each label's more probable value, (N, L)."""
        return torch.maximum(predictions, 1 - predictions)

    def compare(self, outputs: Tensor, target: Tensor, hard_loss: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the binary cross-entropy of each label, (N, L), and the probabilities (N, L)."""
        return F.binary_cross_entropy_with_logits(outputs, target, reduction="none"), outputs.sigmoid()

    def labels(self, batch: Batch) -> Tensor | None:
        """Return the labels (B, L) of a batch; None if it does not show how many labels a sample has."""
        y = batch.y
        if y is None or (y.ndim == 1 and self.name == "multilabel"):
            return None
        if self.name == "binary" and batch.partner is not None and y.ndim == 2 and y.shape[1] == 2:
            y = y[:, 1]  # mixed labels of two classes are their probabilities
        if self.name == "binary" and y.shape[1:] not in ((), (1,)):
            raise InputError(f"labels must be one a sample, (B,) = [{len(y)}], got {[*y.shape]}")
        return columns(y)

    # Rounds of the whole pool.

    def check_labels(self, y: Tensor, outputs: int, data: Any, owner: str) -> None:
        """Raise InputError if a label is nowhere known to be 1, or nowhere known to be 0."""
        if y.ndim == 1:
            check_classes(_as_classes(y), 2, data, owner)
            return
        if y.shape[1] != outputs:
            raise InputError(f"{owner}: samples have {y.shape[1]} labels, but the student gives {outputs} outputs")
        names = getattr(data, "class_names", None)
        for value in (1, 0):
            lacking = (~(_as_classes(y) == value).any(dim=0)).nonzero().flatten().tolist()
            if lacking:
                named = names[lacking[0]] if names and len(names) == outputs else str(lacking[0])
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                raise InputError(
                    f"{owner}: label {named!r}{more} is {value} in no labeled sample, so no pseudo-label can be "
                    "learned for it; label some, remove the label, or let a teacher label the pool (source: teacher)"
                )

    def make_round(
        self,
        index: Tensor,
        y: Tensor,
        predictions: Tensor,
        select: Select,
        previous: Any,
        epoch: int,
    ) -> tuple[PoolLabels, Tensor]:
        """Return a round, and the given labels: (M,) for one a sample, else (M, L) with -100 where one is missing.

        A label whose probability is 0.5 is never accepted: it is neither 0 nor 1.
        """
        unknown = self.unknown(y)
        rows = unknown.any(dim=1)
        found, asked = predictions[rows], unknown[rows]
        target, weight = select(found, predictions[~rows], index[rows])
        for name, values in (("targets", target), ("weights", weight)):
            if values.shape != found.shape or not ((values == 0) | (values == 1)).all():
                raise InputError(
                    f"{name} of stored pseudo-labels of the {self.name} task must be zeros and ones {[*found.shape]}, "
                    f"got {[*values.shape]} from the selection"
                )
        weight = torch.where(self.confidence(found) > 0.5 + 1e-6, weight, 0.0)
        label = target[asked].to(y.dtype)
        sample, number = asked.nonzero(as_tuple=True)
        several = y.ndim > 1
        changed = torch.zeros(len(label), dtype=torch.bool) if previous is None else label != previous.label
        table = PseudoLabels(
            index=index[rows][sample],
            label=label,
            confidence=torch.where(target > 0.5, found, 1 - found)[asked],
            weight=weight[asked],
            changed=changed,
            round=0 if previous is None else previous.round + 1,
            epoch=epoch,
            output=number if several else None,
        )
        given = _as_classes(y)[~unknown.all(dim=1)]
        return table, given


def _as_classes(y: Tensor) -> Tensor:
    """Return labels as 0 and 1, -100 where they are missing; probabilities above 0.5 are 1."""
    return torch.where(is_labeled(y), (y > 0.5).long(), IGNORE_INDEX)
