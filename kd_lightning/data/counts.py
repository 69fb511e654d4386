"""How many samples each class has in each part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.batch import LabelKind
from kd_lightning.data.labels.build import val_labels
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.source import passed_over
from kd_lightning.data.sources.targets import count_classes, has_label, has_one_class
from kd_lightning.data.splits import Split

_MOST_ROWS = 20
_NAME_LENGTH = 30
_IMBALANCE = 10
"""Ratio of the largest to the smallest class from which on both are printed."""


@dataclass(frozen=True)
class ClassCount:
    """Number of samples of a class, or of samples with one of several labels. ``test`` is None without a test part."""

    name: str
    labeled: int
    validation: int
    test: int | None


@dataclass(frozen=True)
class SampleCounts:
    """Number of samples of each part, as training and evaluation use them.

    Attributes:
        rows: One for each class, or for each of several labels. Unlabeled samples have no class here, also where their
            label is only hidden. Empty where labels are dense, or floats other than 0 and 1.
        labeled: Training samples with a label.
        unlabeled: Training samples without one, those of the unlabeled pool and those with a coarse label.
        coarse: Those of them with a coarse label.
        validation: Validation samples.
        test: Test samples; None without a test part.
        validation_without_label: Validation samples that metrics leave out.
        test_without_label: Test samples that metrics leave out.
        unused: Samples of the source that are in no part.
        passed_over: Files and folders of the source that are no samples.
    """

    rows: list[ClassCount]
    labeled: int
    unlabeled: int
    validation: int
    test: int | None
    validation_without_label: int = 0
    test_without_label: int = 0
    unused: int = 0
    passed_over: int = 0
    coarse: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all counts for JSON."""
        counts = asdict(self)
        return {"classes": counts.pop("rows"), "samples": counts}

    def save(self, path: Path) -> None:
        """Write all counts as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """A table of up to 20 classes; further ones are summed."""
        shown = self.rows if len(self.rows) <= _MOST_ROWS else self.rows[: _MOST_ROWS - 1]
        rest = self.rows[len(shown) :]
        table = [["class", "labeled", "unlabeled", "validation", "test"]]
        table += [[_shorten(row.name), str(row.labeled), "", str(row.validation), _text(row.test)] for row in shown]
        if rest:
            sums = [sum(row.labeled for row in rest), sum(row.validation for row in rest)]
            test = None if self.test is None else sum(row.test or 0 for row in rest)
            table.append([f"{len(rest)} more classes", str(sums[0]), "", str(sums[1]), _text(test)])
        table.append(["samples", str(self.labeled), str(self.unlabeled), str(self.validation), _text(self.test)])
        if self.validation_without_label or self.test_without_label:
            test = None if self.test is None else self.test_without_label
            table.append(["without a label", "", "", str(self.validation_without_label), _text(test)])
        if self.coarse:
            table.append(["with a coarse label", "", str(self.coarse), "", ""])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
        sizes = [(row.labeled, row.name) for row in self.rows]
        if sizes and self.labeled and max(sizes)[0] > _IMBALANCE * min(sizes)[0]:
            (least, smallest), (most, largest) = min(sizes), max(sizes)
            lines.append(f"labeled: {least} ({_shorten(smallest)}) to {most} ({_shorten(largest)}) of a class")
        more = {"not used": self.unused, "passed over, since they are no samples": self.passed_over}
        lines += [f"{name}: {count}" for name, count in more.items() if count]
        return "\n".join(lines)


def count_parts(samples: Samples, split: Split, labels: LabelTable, train: Tensor) -> SampleCounts:
    """Count the samples of a datamodule.

    Args:
        samples: The source's images by index.
        split: Which of them are for validation.
        labels: Labels that training may see.
        train: Indices of the samples to train on.
    """
    parts = samples.parts
    images = samples.images
    if parts.test is not None and samples.unlabeled != "test":
        images = [*images, parts.test.images]
    coarse = 0 if labels.kind is None else int((labels.kind[train] == LabelKind.COARSE).sum())
    return count_samples(
        labels.visible,
        train,
        val_labels(parts.train, split).visible[split.val],
        None if parts.test is None else parts.test.targets,
        parts.class_names,
        dense=samples.dense,
        total=len(samples),
        files_passed_over=sum(map(passed_over, images)),
        coarse=coarse,
    )


def count_samples(
    visible: Tensor,
    train: Tensor,
    validation: Tensor,
    test: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    *,
    dense: bool = False,
    total: int | None = None,
    files_passed_over: int = 0,
    coarse: int = 0,
) -> SampleCounts:
    """Count the samples of each class and part.

    Args:
        visible: Labels that training may see, by index: (M,) class indices, (M, L) zeros and ones, or (M,) floats;
            -100 or NaN where there is none.
        train: Indices of the samples to train on, labeled or not.
        validation: Labels of the validation samples, (V,) or (V, L).
        test: Labels of the test samples. Default: None, which means that there is no test part.
        class_names: Names of the classes or labels. Default: None, which means their numbers.
        dense: Whether labels are dense, so that samples are of no class.
        total: Number of samples of the source without its test part, of which those in no part are not used. Default:
            None, which means that all are used.
        files_passed_over: Number of files and folders that are no samples.
        coarse: Number of samples to train on that have a coarse label.
    """
    parts = [visible[train], validation] + ([] if test is None else [test])
    known = [has_label(part) for part in parts]
    counts = [part[kept] for part, kept in zip(parts, known, strict=True)]
    names, columns = ([], [[] for _ in parts]) if dense else _count_classes(counts, class_names)
    columns += [[None] * len(names)] * (test is None)
    rows = [ClassCount(*row) for row in zip(names, *columns, strict=True)]
    labeled = len(counts[0])
    return SampleCounts(
        rows,
        labeled,
        len(train) - labeled,
        len(validation),
        None if test is None else len(test),
        len(validation) - len(counts[1]),
        0 if test is None else len(test) - len(counts[2]),
        0 if total is None else total - len(train) - len(validation),
        files_passed_over,
        coarse,
    )


def _count_classes(parts: Sequence[Tensor], names: Sequence[str] | None) -> tuple[list[str], list[list[Any]]]:
    """Names of the classes, and for each part the number of its samples of each class."""
    first = parts[0]
    if first.ndim == 2:
        if any(((part < 0) | (part > 1)).any() for part in parts):  # values of regression; NaN is neither
            return [], [[] for _ in parts]
        count = first.shape[1]
        if all(_are_probabilities(part) for part in parts):  # the most likely class counts
            columns = [torch.bincount(part.argmax(dim=1), minlength=count).tolist() for part in parts]
        else:
            columns = [(part > 0.5).sum(dim=0).tolist() for part in parts]
    elif first.ndim == 1 and (has_one_class(first) or all(((p == 0) | (p == 1)).all() for p in parts)):
        count = max([2 if first.is_floating_point() else 0, *(count_classes(part, None) for part in parts)])
        count = max(count, len(names or ())) if has_one_class(first) else count
        columns = [torch.bincount(part.long(), minlength=count).tolist() for part in parts]
    else:
        return [], [[] for _ in parts]
    return [*names] if names and len(names) == count else [*map(str, range(count))], columns


def _are_probabilities(part: Tensor) -> bool:
    """Whether each row (N, C) sums to 1."""
    return bool(((part.sum(dim=1) - 1).abs() < 1e-2).all())


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}..."


def _text(count: int | None) -> str:
    return "" if count is None else str(count)
