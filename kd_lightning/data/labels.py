"""The labels that training batches are filled with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.batch import MISSING, Batch, Kind, is_labeled
from kd_lightning.data.coarse_labels import CoarseLabels
from kd_lightning.data.label_file import KINDS
from kd_lightning.data.label_noise import LabelNoise
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels import PseudoLabels


class Labels:
    """The visible label of each index, and pseudo-labels where there is none.

    Args:
        visible: (N,) class indices, or (N, L) zeros and ones; missing ones are -100 or NaN.
        kind: What each of them is, (N,) numbers of ``Kind``; None: clean where it is known.
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
        rows = (self._first_kind != Kind.MISSING).nonzero().flatten()
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
        plain = torch.where(known, Kind.CLEAN, Kind.MISSING).to(torch.int8)
        self.kind = plain if self._first_kind is None else self._first_kind.clone()
        self.kind[accepted] = Kind.PSEUDO
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
            coarse = self.kind[batch.index] == Kind.COARSE
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
            0 if self.kind is None else int((self.kind[index] == kind).sum()) for kind in (Kind.PSEUDO, Kind.COARSE)
        )
        return int(is_labeled(self.y[index]).sum()) + coarse, pseudo, coarse


def hide(truth: Tensor, labeled: list[int], size: int) -> Tensor:
    """The labels of ``size`` indices, where only the labeled ones can be seen: the others are -100, or NaN."""
    missing = float("nan") if truth.is_floating_point() else MISSING
    if truth.ndim > 1:  # of many labels each may be missing
        truth, missing = truth.float(), float("nan")
    labels = torch.full((size, *truth.shape[1:]), missing, dtype=truth.dtype)
    known = [index for index in labeled if index < len(truth)]  # of the others a label file tells
    labels[known] = truth[known]
    return labels


def see(
    truth: Tensor,
    split: Split,
    size: int,
    *,
    noisy: bool = False,
    noise: LabelNoise | None = None,
    coarse: CoarseLabels | None = None,
    class_names: Sequence[str] | None = None,
) -> Labels:
    """What training may see of the truth.

    Args:
        truth: The training part's labels: (N,) class indices, or (N, L) zeros and ones.
        split: Which are labeled, and what a label file says.
        size: Number of images, at least N.
        noisy: Whether the truth may itself be wrong.
        noise: How labels go wrong; those that a label file tells do not.
        coarse: Which of the split's unlabeled samples have a superclass for a label.
        class_names: For messages, and to know how many classes there are.

    Raises:
        InputError: For noise, coarse labels or answers where a sample has many labels, and for answers with a
            superclass that ``coarse`` does not name.
    """
    y = hide(truth, split.labeled, size)
    if not noisy and noise is None and coarse is None and not split.answers:
        return Labels(y)
    if truth.ndim > 1 or truth.is_floating_point():
        raise InputError(
            "noisy, label_noise, coarse and labels are for samples of one class each; these have many labels"
        )
    classes = len(class_names) if class_names else int(truth.max()) + 1
    kind = torch.where(is_labeled(y), Kind.NOISY if noisy else Kind.CLEAN, Kind.MISSING).to(torch.int8)
    if noise is not None:
        labeled = [index for index in split.labeled if index < len(truth)]
        y[labeled] = noise.draw(truth, classes, split.seed)[labeled]
        kind[labeled] = Kind.NOISY
    group = members = weight = None
    if coarse is not None:
        members = coarse.members(classes, class_names)
        chosen = coarse.choose([index for index in split.unlabeled if index < len(truth)], len(truth), split.seed)
        group = torch.zeros(size, dtype=torch.long)
        group[chosen] = members.int().argmax(dim=0)[truth[chosen]]
        kind[chosen] = Kind.COARSE
    hidden = {*split.held_out}
    if answers := [answer for answer in split.answers if answer[0] not in hidden]:
        index, said, kinds, shares = (list(column) for column in zip(*answers, strict=True))
        kind[index] = torch.tensor([KINDS[name] for name in kinds], dtype=torch.int8)
        fine = [name in ("clean", "noisy") for name in kinds]
        y[index] = torch.tensor([label if known else MISSING for label, known in zip(said, fine, strict=True)])
        for number, label, name in zip(index, said, kinds, strict=True):
            if name == "coarse":
                if group is None or coarse is None or label not in coarse.names:
                    raise InputError(f"coarse must name the superclasses of the labels, and does not name {label!r}")
                group[number] = coarse.names.index(label)
        if any(share != 1.0 for share in shares):
            weight = torch.ones(size)
            weight[index] = torch.tensor(shares, dtype=torch.float32)
    return Labels(y, kind, weight, group, members)
