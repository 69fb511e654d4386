"""Build the labels that training may see, from a split and the true labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, LabelKind, is_labeled
from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_file import KINDS
from kd_lightning.data.labels.label_noise import LabelNoise
from kd_lightning.data.labels.several_labels import check_several, has_several_labels, to_tensor
from kd_lightning.data.labels.table import LabelTable, true_labels
from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.sources.source import Part, Parts
from kd_lightning.data.sources.targets import count_classes, has_one_class
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError


def build_labels(
    truth: Tensor,
    split: Split,
    size: int,
    *,
    noisy: bool = False,
    noise: LabelNoise | None = None,
    coarse: CoarseLabels | None = None,
    class_names: Sequence[str] | None = None,
    dense: bool = False,
    weights: Tensor | None = None,
) -> LabelTable:
    """Build the labels that training may see.

    Args:
        truth: Labels of the training part: (N,) class indices, or (N, L) zeros and ones.
        split: Which samples are labeled, and the rows of label files.
        size: Number of images, at least N.
        noisy: Whether ``truth`` itself may be wrong.
        noise: Simulated noise. Labels of a label file stay as they are. Default: None, which means no noise.
        coarse: Superclasses, which become labels of the split's unlabeled samples. Default: None, which means none.
        class_names: Names of the classes. Default: None, which means 0 ... max(truth).
        dense: Whether labels are dense; ``truth`` is 0 for samples that have some then.
        weights: Factor of the hard loss of each sample of the training part, (N,). A label row replaces it. Default:
            None, which means 1.

    Raises:
        InputError: For noise or coarse labels if a sample has many labels, for label rows if these are not zeros and
            ones, and for a label row with a superclass that ``coarse`` does not name.
    """
    y = mask_labels(truth, split.labeled, size)
    weight = None if weights is None else torch.cat([weights.float(), torch.ones(size - len(weights))])
    if not noisy and noise is None and coarse is None and not split.label_rows:
        single = has_one_class(truth) and not dense
        return LabelTable(y, weight=weight, dense=dense, classes=count_classes(truth, class_names) if single else None)
    if dense:
        raise InputError("noisy, label_noise, coarse and label_file need one label for a sample; these are dense")
    if has_several_labels(truth) and not noisy and noise is None and coarse is None:
        return LabelTable(
            _with_several(y, [row for row in split.label_rows if row[0] not in _hidden(split)]), weight=weight
        )
    if truth.ndim > 1 or truth.is_floating_point():
        raise InputError(
            "noisy, label_noise, coarse and label_file need samples of one class each, or label_file alone zeros and "
            "ones; these have many labels"
        )
    classes = count_classes(truth, class_names)
    kind = torch.where(is_labeled(y), LabelKind.NOISY if noisy else LabelKind.CLEAN, LabelKind.MISSING).to(torch.int8)
    known = is_labeled(truth).tolist()  # the source may have no label for some samples
    if noise is not None:
        labeled = [index for index in split.labeled if index < len(truth) and known[index]]
        y[labeled] = noise.sample(truth, classes, split.seed)[labeled]
        kind[labeled] = LabelKind.NOISY
    group = members = None
    if coarse is not None:
        members = coarse.members(classes, class_names)
        candidates = [index for index in split.unlabeled if index < len(truth) and known[index]]
        selected = coarse.select(candidates, len(truth), split.seed)
        group = torch.zeros(size, dtype=torch.long)
        group[selected] = members.int().argmax(dim=0)[truth[selected]]
        kind[selected] = LabelKind.COARSE
    hidden = _hidden(split)
    if rows := [row for row in split.label_rows if row[0] not in hidden]:
        index, labels, kinds, factors = (list(column) for column in zip(*rows, strict=True))
        kind[index] = torch.tensor([KINDS[name] for name in kinds], dtype=torch.int8)
        fine = [name in ("clean", "noisy") for name in kinds]
        y[index] = torch.tensor([label if one else IGNORE_INDEX for label, one in zip(labels, fine, strict=True)])
        for number, label, of_kind in zip(index, labels, kinds, strict=True):
            if of_kind == "coarse":
                name = normal_name(label)
                if group is None or coarse is None or name not in coarse.names:
                    raise InputError(
                        f"coarse must name the superclasses of the label file, but does not name {label!r}"
                    )
                group[number] = coarse.names.index(name)
        if weight is not None or any(value != 1.0 for value in factors):
            weight = torch.ones(size) if weight is None else weight
            weight[index] = torch.tensor(factors, dtype=torch.float32)
    return LabelTable(y, kind, weight, group, members, classes=classes)


def _hidden(split: Split) -> set[int]:
    return {*split.held_out, *split.left_out, *split.val}


def _with_several(labels: Tensor, rows: Sequence[Sequence[Any]]) -> Tensor:
    """Return multilabel labels (N, L), floats, with those of label rows; NaN where a row has none."""
    labels = labels.float()
    for index, label, kind, _ in rows:
        if index < len(labels):
            labels[index] = to_tensor(label) if kind == "clean" else float("nan")
    return labels


def val_labels(part: Part, split: Split) -> LabelTable:
    """The labels that validation compares with: those of the source, and the corrections of label files.

    Args:
        part: The training part, in which the validation samples are.
        split: The split.
    """
    val = {*split.val} if split.label_rows else set()
    if not (rows := [row for row in split.label_rows if row[0] in val]):
        return true_labels(part)
    return LabelTable(corrected_labels(part.targets, rows), dense=part.dense)


def corrected_labels(targets: Tensor, rows: Sequence[Sequence[Any]]) -> Tensor:
    """Return labels with those of label rows; -100 or NaN where a row has none. Rows of others are left out.

    Args:
        targets: Class indices (N,), or zeros and ones (N, L).
        rows: Label rows of a split.
    """
    targets = targets.clone()
    if targets.ndim > 1:
        return _with_several(targets, rows)
    for index, label, kind, _ in rows:
        if index < len(targets):
            targets[index] = label if kind in ("clean", "noisy") else IGNORE_INDEX
    return targets


def mask_labels(truth: Tensor, labeled: list[int], size: int) -> Tensor:
    """Labels of ``size`` indices; all but the labeled ones are missing, -100 or (where labels are floats) NaN."""
    missing = float("nan") if truth.is_floating_point() else IGNORE_INDEX
    if truth.ndim > 1:  # one of many labels may be missing, which is NaN
        truth, missing = truth.float(), float("nan")
    labels = torch.full((size, *truth.shape[1:]), missing, dtype=truth.dtype)
    indices = [index for index in labeled if index < len(truth)]  # labels of other indices come from a label file
    labels[indices] = truth[indices]
    return labels


def check_label_rows(split: Split, parts: Parts, *, unlabeled_part: bool) -> None:
    """Check that the split's label rows belong to the images of the source.

    Args:
        split: The split.
        parts: Parts of the source.
        unlabeled_part: Whether indices behind the training part are those of the source's unlabeled part.

    Raises:
        InputError: For rows of an unlabeled part that is absent, and for a row whose label, kind or weight cannot be.
    """
    targets = parts.train.targets
    for index, label, kind, weight in split.label_rows if has_several_labels(targets) else ():
        check_several(label, kind, weight, targets.shape[1], f"labeled: the label row of sample {index}")
    if split.label_rows and targets.ndim == 1 and not targets.is_floating_point():
        classes = count_classes(targets, parts.class_names)
        for row in split.label_rows:
            _check_label_row(row, classes)
    size = len(parts.train.images)
    beyond = [row[0] for row in split.label_rows if row[0] >= size]
    if not beyond:
        return
    what = f"labeled: the split has labels for the source's unlabeled part (sample {beyond[0]})"
    if parts.unlabeled is None or not unlabeled_part:
        raise InputError(f"{what}, which {'is gone' if parts.unlabeled is None else 'unlabeled: test leaves out'}")
    if max(beyond) >= size + len(parts.unlabeled):
        raise InputError(f"{what}, which has only {len(parts.unlabeled)} samples")


def _check_label_row(row: Sequence[Any], classes: int) -> None:
    index, label, kind, weight = row
    place = f"labeled: the label row of sample {index} must have"
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{place} one of the kinds {', '.join(KINDS)}, got {kind!r:.80}")
    if kind in ("clean", "noisy") and (type(label) is not int or not 0 <= label < classes):
        raise InputError(f"{place} a class 0 ... {classes - 1}, got {label!r:.80}")
    if kind == "coarse" and not isinstance(label, str):
        raise InputError(f"{place} the name of a superclass, got {label!r:.80}")
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise InputError(f"{place} a weight of at least 0, got {weight!r:.80}")


def check_coarse(coarse: CoarseLabels | None, labeled: Any) -> None:
    """Raise InputError if coarse labels are to be made, but every image has a fine one (``labeled`` is None)."""
    if coarse is not None and coarse.fraction > 0 and labeled is None:
        raise InputError(
            "coarse: every image has a fine label, since labeled is not set; set labeled, or coarse.fraction: 0 if "
            "coarse labels come from a label file alone"
        )


def check_label_options(data: Any) -> None:
    """Raise InputError for an option of a datamodule that needs one label for a sample, if its labels are dense."""
    names = [name for name in ("noisy", "label_noise", "coarse", "label_file") if getattr(data, name)]
    if names and data.samples.dense:
        raise InputError(
            f"{names[0]} needs one label for a sample, but those of {type(data.source).__name__} are dense, one for "
            f"each position; remove {names[0]}"
        )
