"""The table of labels that batches are filled from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, Batch, LabelKind, is_labeled
from kd_lightning.data.sources.source import Part
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PoolLabels


def true_labels(part: Part) -> LabelTable:
    """The table of a part's own labels, for evaluation."""
    return LabelTable(part.targets, dense=part.dense)


class LabelTable:
    """The visible label of each index, and pseudo-labels of samples without one.

    Args:
        visible: (N,) class indices, or (N, L) zeros and ones. Missing ones are -100 or NaN. Pseudo-labels are of
            samples, or of single labels of them.
        kind: Kind of each label, (N,) numbers of ``LabelKind``. Default: None, which means clean where known.
        weight: Factor of each sample's hard loss, (N,), at least 0. Default: None, which means 1.
        group: Superclass of samples of kind coarse, (N,); any number elsewhere. Default: None, which means none.
        members: Which classes each superclass holds, (G, C) booleans. Needed with ``group``.
        dense: Whether labels are dense: ``visible`` is 0 for samples whose labels may be seen, and the labels
            themselves are in the batches already.
        classes: Number of classes, for mixed labels. Default: None, which means that labels are no class indices.

    Attributes:
        version: Number of times that pseudo-labels were replaced.
    """

    def __init__(
        self,
        visible: Tensor,
        kind: Tensor | None = None,
        weight: Tensor | None = None,
        group: Tensor | None = None,
        members: Tensor | None = None,
        dense: bool = False,
        classes: int | None = None,
    ) -> None:
        self.classes = classes
        self.visible = visible
        self.y = visible
        self.version = 0
        self._known = is_labeled(visible)
        self.kind = self._initial_kind = kind
        self.weight = self._initial_weight = weight
        self.group = group
        self.members = members
        self.dense = dense
        self._soft_labels: Tensor | None = None
        self._soft_rows = torch.empty(0, dtype=torch.long)

    @property
    def hash(self) -> str:
        """SHA-256 of labels that are noisy, coarse, weighted or from a file; empty if the split determines them."""
        if self._initial_kind is None and self._initial_weight is None:
            return ""
        kind = torch.zeros(len(self.visible)) if self._initial_kind is None else self._initial_kind
        rows = (kind != LabelKind.MISSING).nonzero().flatten()
        digest = hashlib.sha256(rows.numpy().tobytes())
        for part in (self.visible, self._initial_kind, self._initial_weight, self.group):
            digest.update(b"none" if part is None else part[rows].numpy().tobytes())
        digest.update(b"none" if self.members is None else self.members.numpy().tobytes())
        return digest.hexdigest()

    def set_pseudo_labels(self, labels: PoolLabels) -> None:
        """Replace all earlier pseudo-labels by the accepted ones of this round.

        Raises:
            InputError: If the labels are of another form than those of the samples, and for a pseudo-label of a labeled
                or unknown sample.
        """
        several, floats = self.visible.ndim > 1, self.visible.is_floating_point()
        if self.dense or several != (labels.output is not None) or floats != labels.label.is_floating_point():
            form = "one" if labels.output is None else "several"
            kind = "dense" if self.dense else "several" if several else "one"
            raise InputError(
                f"pseudo-labels must fit the labels of the samples, which are {kind} for each, {self.visible.dtype}; "
                f"got {form} for each, {labels.label.dtype}; the task of the module must be that of the labels"
            )
        known = is_labeled(self.visible)
        if len(labels.index) and int(labels.index.max()) >= len(known):
            raise InputError(f"pseudo-labels: samples must be 0 ... {len(known) - 1}, got {int(labels.index.max())}")
        accepted = labels.index[labels.accepted]
        places: Any = accepted if labels.output is None else (accepted, labels.output[labels.accepted])
        taken = known[labels.index] if labels.output is None else known[labels.index, labels.output]
        if taken.any():
            raise InputError(f"pseudo-labels: sample {int(labels.index[taken][0])} has a label already")
        self.y = self.visible.clone()
        self.y[places] = labels.label[labels.accepted].to(self.y)
        plain = torch.where(known, LabelKind.CLEAN, LabelKind.MISSING).to(torch.int8)
        self.kind = plain if self._initial_kind is None else self._initial_kind.clone()
        self.kind[places] = LabelKind.PSEUDO
        self.weight, given = self._initial_weight, labels.weight[labels.accepted].float()
        if several and (given != 1).any():
            raise InputError("pseudo-labels: weights must be 0 or 1 where samples have several labels")
        if not several and (self.weight is not None or (given != 1).any()):
            self.weight = torch.ones(len(known)) if self.weight is None else self.weight.clone()
            self.weight[accepted] = given.to(self.weight)
        self.version += 1
        self._known = is_labeled(self.y)
        self._soft_labels = labels.soft
        if self.classes is not None:  # a teacher may know more classes
            most = int(self.y.max()) + 1 if labels.soft is None else labels.soft.shape[1]
            self.classes = max(self.classes, most)
        if labels.soft is not None:
            self._soft_rows = torch.full((len(known),), -1)
            self._soft_rows[accepted] = labels.accepted.nonzero().flatten()

    def fill(self, batch: Batch) -> Batch:
        """Fill in the labels of a batch by its ``index``, and return the batch.

        Dense labels are in the batch already. Those that may not be seen become -100, or NaN where they are floats.
        """
        assert batch.index is not None
        if batch.partner is not None:
            return self._fill_mixed(batch)
        if self.dense:
            assert batch.y is not None
            hidden = ~self._known[batch.index]
            batch.labeled = (~hidden).nonzero().flatten()
            if hidden.any():
                batch.y[hidden] = float("nan") if batch.y.is_floating_point() else IGNORE_INDEX
            return batch
        batch.y = self.y[batch.index]
        if self.kind is not None:
            batch.kind = self.kind[batch.index]
        if self.weight is not None:
            batch.weight = self.weight[batch.index]
        if self.group is not None and self.members is not None and self.kind is not None:
            coarse = self.kind[batch.index] == LabelKind.COARSE
            batch.candidates = self.members[self.group[batch.index]] & coarse.unsqueeze(1)
        if self._soft_labels is not None:
            row = self._soft_rows[batch.index]
            batch.soft = self._soft_labels[row] * (row >= 0).unsqueeze(1)
        known = self._known[batch.index]
        if known.ndim == 1 or known.all():  # a sample of many labels may be labeled in part
            batch.labeled = known.reshape(len(known), -1)[:, 0].nonzero().flatten()
        return batch

    def _fill_mixed(self, batch: Batch) -> Batch:
        """Fill in the mixed labels of a batch of mixed images. A row has none if one of both samples has none."""
        assert batch.index is not None
        assert batch.partner is not None
        assert batch.share is not None
        if self.group is not None:
            raise InputError("mix: coarse labels cannot be mixed; leave out mix, or the rows of kind coarse")
        first, second = (self._targets(index) for index in (batch.index, batch.partner))
        own = batch.share
        if self.weight is not None:  # each label counts with the weight of its sample
            parts = torch.stack([own * self.weight[batch.index], (1 - own) * self.weight[batch.partner]])
            batch.weight = parts.sum(dim=0)
            own = torch.where(batch.weight > 0, parts[0] / batch.weight, own)
        own = own.view(-1, *[1] * (first.ndim - 1))
        batch.y = own * first + (1 - own) * second
        if self.kind is not None:
            kinds = self.kind[torch.stack([batch.index, batch.partner])]
            some = (kinds == LabelKind.MISSING).any(dim=0)
            mixed = torch.where(kinds[0] == kinds[1], kinds[0], LabelKind.NOISY)  # clean with noisy
            mixed = torch.where((kinds == LabelKind.PSEUDO).any(dim=0), LabelKind.PSEUDO, mixed)
            batch.kind = torch.where(some, LabelKind.MISSING, mixed).to(torch.int8)
        known = is_labeled(batch.y).reshape(len(batch.y), -1)
        if (known.any(dim=1) == known.all(dim=1)).all():
            batch.labeled = known.all(dim=1).nonzero().flatten()
        return batch

    def _targets(self, index: Tensor) -> Tensor:
        """Return labels as floats, NaN where missing: (B,) or (B, L); of one class each, as probabilities (B, C)."""
        y = self.y[index]
        if y.is_floating_point() or self.classes is None:
            return torch.where(is_labeled(y), y.float(), torch.nan)
        targets = torch.nn.functional.one_hot(y.clamp_min(0), self.classes).float()
        if self._soft_labels is not None:
            row = self._soft_rows[index]
            targets = torch.where((row >= 0)[:, None], self._soft_labels[row].float(), targets)
        return targets.masked_fill((y < 0)[:, None], torch.nan)

    def count_up_to(self, index: Tensor, partner: Tensor | None = None) -> Tensor:
        """Count the labels, pseudo-labels and coarse labels among the first k samples at these indices (K,).

        Args:
            index: The samples.
            partner: The samples that they are mixed with, (K,). Default: None, which means that they are not mixed.

        Returns:
            (K + 1, 3) numbers. Pseudo-labels and coarse labels are labels, too.
        """
        counts = torch.zeros(len(index) + 1, 3, dtype=torch.long)
        known = self._known[index]
        known = known if partner is None else known & self._known[partner]
        counts[1:, 0] = _per_sample(known)
        if self.kind is not None:
            pseudo, coarse = (self.kind == kind for kind in (LabelKind.PSEUDO, LabelKind.COARSE))
            # a pseudo-label, mixed with a sample without one, is none
            is_pseudo = pseudo[index] if partner is None else known & (pseudo[index] | pseudo[partner])
            counts[1:, 1], counts[1:, 2] = _per_sample(is_pseudo), _per_sample(coarse[index])
            counts[:, 0] += counts[:, 2]
        return counts.cumsum(dim=0)


def _per_sample(marks: Tensor) -> Tensor:
    """Return the number of marks of each sample, (N,), of booleans (N,) or (N, L)."""
    return marks.long() if marks.ndim == 1 else marks.sum(dim=1)
