"""The labels that training batches are filled with."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PseudoLabels


class LabelTable:
    """The visible label of each index, and pseudo-labels where there is none.

    Args:
        visible: (N,) class indices, or (N, L) zeros and ones; missing ones are -100 or NaN.
        kind: What each of them is, (N,) numbers of ``LabelKind``; None: clean where it is known.
        weight: What each sample's hard loss is multiplied by, (N,); None: 1.
        group: The superclass of samples whose kind is coarse, (N,); any number elsewhere.
        members: Which classes each superclass holds, (G, C) booleans.
    """

    def __init__(
        self,
        visible: Tensor,
        kind: Tensor | None = None,
        weight: Tensor | None = None,
        group: Tensor | None = None,
        members: Tensor | None = None,
    ) -> None:
        self.visible = visible
        self.y = visible
        self.kind = self._first_kind = kind
        self.weight = weight
        self.group = group
        self.members = members
        self._soft: Tensor | None = None
        self._place = torch.empty(0, dtype=torch.long)

    @property
    def hash(self) -> str:
        """SHA-256 of what noise, coarse labels and answers made of the labels; empty where the split tells all."""
        if self._first_kind is None:
            return ""
        rows = (self._first_kind != LabelKind.MISSING).nonzero().flatten()
        digest = hashlib.sha256(rows.numpy().tobytes())
        for part in (self.visible, self._first_kind, self.weight, self.group):
            digest.update(b"none" if part is None else part[rows].numpy().tobytes())
        digest.update(b"none" if self.members is None else self.members.numpy().tobytes())
        return digest.hexdigest()

    def set(self, labels: PseudoLabels) -> None:
        """Fill in the accepted ones, in place of all that were set before.

        Raises:
            InputError: If a sample may have several labels, or a labeled or unknown sample is to be labeled.
        """
        if self.visible.ndim > 1 or self.visible.is_floating_point():
            raise InputError("pseudo-labels are for samples of one class each; these have many labels")
        known = is_labeled(self.visible)
        if len(labels.index) and int(labels.index.max()) >= len(known):
            raise InputError(f"pseudo-labels: sample {int(labels.index.max())}, but there are only {len(known)}")
        if known[labels.index].any():
            raise InputError(f"pseudo-labels: sample {int(labels.index[known[labels.index]][0])} has a label already")
        accepted = labels.index[labels.accepted]
        self.y = self.visible.clone()
        self.y[accepted] = labels.label[labels.accepted]
        plain = torch.where(known, LabelKind.CLEAN, LabelKind.MISSING).to(torch.int8)
        self.kind = plain if self._first_kind is None else self._first_kind.clone()
        self.kind[accepted] = LabelKind.PSEUDO
        self._soft = labels.soft
        if labels.soft is not None:
            self._place = torch.full((len(known),), -1)
            self._place[accepted] = labels.accepted.nonzero().flatten()

    def fill(self, batch: Batch) -> Batch:
        """Give a batch its labels by index."""
        assert batch.index is not None
        batch.y = self.y[batch.index]
        if self.kind is not None:
            batch.kind = self.kind[batch.index]
        if self.weight is not None:
            batch.weight = self.weight[batch.index]
        if self.group is not None and self.members is not None and self.kind is not None:
            coarse = self.kind[batch.index] == LabelKind.COARSE
            batch.candidates = self.members[self.group[batch.index]] & coarse.unsqueeze(1)
        if self._soft is not None:
            place = self._place[batch.index]
            batch.soft = self._soft[place] * (place >= 0).unsqueeze(1)
        known = is_labeled(batch.y)
        if known.ndim == 1 or known.all():  # of many labels a part may be known
            batch.labeled = known.reshape(len(known), -1)[:, 0].nonzero().flatten()
        return batch

    def count(self, index: Tensor) -> tuple[int, int, int]:
        """How many labels there are among some indices; how many of them are pseudo-labels, and how many are coarse."""
        pseudo, coarse = (
            0 if self.kind is None else int((self.kind[index] == kind).sum())
            for kind in (LabelKind.PSEUDO, LabelKind.COARSE)
        )
        return int(is_labeled(self.y[index]).sum()) + coarse, pseudo, coarse
