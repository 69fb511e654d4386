"""The table of labels that batches are filled from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PseudoLabels


class LabelTable:
    """The visible label of each index, and pseudo-labels of samples without one.

    Args:
        visible: (N,) class indices, or (N, L) zeros and ones. Missing ones are -100 or NaN.
        kind: Kind of each label, (N,) numbers of ``LabelKind``. Default: None, which means clean where known.
        weight: Factor of each sample's hard loss, (N,), at least 0. Default: None, which means 1.
        group: Superclass of samples of kind coarse, (N,); any number elsewhere. Default: None, which means none.
        members: Which classes each superclass holds, (G, C) booleans. Needed with ``group``.
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
        self.kind = self._initial_kind = kind
        self.weight = weight
        self.group = group
        self.members = members
        self._soft_labels: Tensor | None = None
        self._soft_rows = torch.empty(0, dtype=torch.long)

    @property
    def hash(self) -> str:
        """SHA-256 of labels that are noisy, coarse or from a file; empty if the split alone determines the labels."""
        if self._initial_kind is None:
            return ""
        rows = (self._initial_kind != LabelKind.MISSING).nonzero().flatten()
        digest = hashlib.sha256(rows.numpy().tobytes())
        for part in (self.visible, self._initial_kind, self.weight, self.group):
            digest.update(b"none" if part is None else part[rows].numpy().tobytes())
        digest.update(b"none" if self.members is None else self.members.numpy().tobytes())
        return digest.hexdigest()

    def set_pseudo_labels(self, labels: PseudoLabels) -> None:
        """Replace all earlier pseudo-labels by the accepted ones of this round.

        Raises:
            InputError: If a sample may have several labels, and for a pseudo-label of a labeled or unknown sample.
        """
        if self.visible.ndim > 1 or self.visible.is_floating_point():
            raise InputError("pseudo-labels need samples of one class each; these have many labels")
        known = is_labeled(self.visible)
        if len(labels.index) and int(labels.index.max()) >= len(known):
            raise InputError(f"pseudo-labels: samples must be 0 ... {len(known) - 1}, got {int(labels.index.max())}")
        if known[labels.index].any():
            raise InputError(f"pseudo-labels: sample {int(labels.index[known[labels.index]][0])} has a label already")
        accepted = labels.index[labels.accepted]
        self.y = self.visible.clone()
        self.y[accepted] = labels.label[labels.accepted]
        plain = torch.where(known, LabelKind.CLEAN, LabelKind.MISSING).to(torch.int8)
        self.kind = plain if self._initial_kind is None else self._initial_kind.clone()
        self.kind[accepted] = LabelKind.PSEUDO
        self._soft_labels = labels.soft
        if labels.soft is not None:
            self._soft_rows = torch.full((len(known),), -1)
            self._soft_rows[accepted] = labels.accepted.nonzero().flatten()

    def fill(self, batch: Batch) -> Batch:
        """Fill in the labels of a batch by its ``index``, and return the batch."""
        assert batch.index is not None
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
        known = is_labeled(batch.y)
        if known.ndim == 1 or known.all():  # a sample of many labels may be labeled in part
            batch.labeled = known.reshape(len(known), -1)[:, 0].nonzero().flatten()
        return batch

    def count(self, index: Tensor) -> tuple[int, int, int]:
        """Number of labels, of pseudo-labels and of coarse labels at these indices; the first includes the others."""
        pseudo, coarse = (
            0 if self.kind is None else int((self.kind[index] == kind).sum())
            for kind in (LabelKind.PSEUDO, LabelKind.COARSE)
        )
        return int(is_labeled(self.y[index]).sum()) + coarse, pseudo, coarse
