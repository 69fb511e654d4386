"""What training may see of the true labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, LabelKind, is_labeled
from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_file import KINDS
from kd_lightning.data.labels.label_noise import LabelNoise
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError


def mask_labels(truth: Tensor, labeled: list[int], size: int) -> Tensor:
    """The labels of ``size`` indices, where only the labeled ones can be seen: the others are -100, or NaN."""
    missing = float("nan") if truth.is_floating_point() else IGNORE_INDEX
    if truth.ndim > 1:  # of many labels each may be missing
        truth, missing = truth.float(), float("nan")
    labels = torch.full((size, *truth.shape[1:]), missing, dtype=truth.dtype)
    known = [index for index in labeled if index < len(truth)]  # of the others a label file tells
    labels[known] = truth[known]
    return labels


def build_labels(
    truth: Tensor,
    split: Split,
    size: int,
    *,
    noisy: bool = False,
    noise: LabelNoise | None = None,
    coarse: CoarseLabels | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelTable:
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
    y = mask_labels(truth, split.labeled, size)
    if not noisy and noise is None and coarse is None and not split.answers:
        return LabelTable(y)
    if truth.ndim > 1 or truth.is_floating_point():
        raise InputError(
            "noisy, label_noise, coarse and labels are for samples of one class each; these have many labels"
        )
    classes = len(class_names) if class_names else int(truth.max()) + 1
    kind = torch.where(is_labeled(y), LabelKind.NOISY if noisy else LabelKind.CLEAN, LabelKind.MISSING).to(torch.int8)
    if noise is not None:
        labeled = [index for index in split.labeled if index < len(truth)]
        y[labeled] = noise.draw(truth, classes, split.seed)[labeled]
        kind[labeled] = LabelKind.NOISY
    group = members = weight = None
    if coarse is not None:
        members = coarse.members(classes, class_names)
        chosen = coarse.choose([index for index in split.unlabeled if index < len(truth)], len(truth), split.seed)
        group = torch.zeros(size, dtype=torch.long)
        group[chosen] = members.int().argmax(dim=0)[truth[chosen]]
        kind[chosen] = LabelKind.COARSE
    hidden = {*split.held_out}
    if answers := [answer for answer in split.answers if answer[0] not in hidden]:
        index, said, kinds, shares = (list(column) for column in zip(*answers, strict=True))
        kind[index] = torch.tensor([KINDS[name] for name in kinds], dtype=torch.int8)
        fine = [name in ("clean", "noisy") for name in kinds]
        y[index] = torch.tensor([label if known else IGNORE_INDEX for label, known in zip(said, fine, strict=True)])
        for number, label, name in zip(index, said, kinds, strict=True):
            if name == "coarse":
                if group is None or coarse is None or label not in coarse.names:
                    raise InputError(f"coarse must name the superclasses of the labels, and does not name {label!r}")
                group[number] = coarse.names.index(label)
        if any(share != 1.0 for share in shares):
            weight = torch.ones(size)
            weight[index] = torch.tensor(shares, dtype=torch.float32)
    return LabelTable(y, kind, weight, group, members)
