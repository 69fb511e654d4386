"""Labels from a CSV or Parquet file, written by people or by the command ``clean``."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, LabelKind
from kd_lightning.data.identity import Identities
from kd_lightning.data.labels.class_numbers import ClassNumbers
from kd_lightning.data.labels.several_labels import (
    Several,
    check_several,
    from_tensor,
    has_several_labels,
    label_columns,
    read_cells,
    rename_columns,
)
from kd_lightning.data.row_samples import RowName, RowSamples
from kd_lightning.data.sources.images import Images
from kd_lightning.data.tables import PATH_COLUMNS, Rows, read_table
from kd_lightning.errors import InputError

KINDS = {"clean": LabelKind.CLEAN, "noisy": LabelKind.NOISY, "coarse": LabelKind.COARSE, "missing": LabelKind.MISSING}
_COLUMNS = ("index", "path", "content", "label", "kind", "weight")
_NAMES = _COLUMNS[:3]


class LabelRow(NamedTuple):
    """The label of one sample, its kind, and the weight of its loss.

    The label is a class by number, a superclass by name, or of a multilabel sample 0, 1 or None for each class.
    """

    sample: int
    label: int | str | Several
    kind: str
    weight: float


def read_label_file(
    path: Path,
    images: Sequence[Images],
    *,
    class_names: Sequence[str],
    identities: Sequence[Identities] | None = None,
    targets: Tensor | None = None,
    group_names: Sequence[str] = (),
    val_indices: Collection[int] = (),
    correct_val: bool = False,
) -> list[LabelRow]:
    """Read a label file with the columns ``index``, ``path`` or ``content``, and ``label`` or ``kind``.

    Where samples have several labels, it has a column for each class instead of ``label``: 0, 1, or an empty cell for a
    missing label. A row without any label and kind is not labeled yet. A class without a column has no label. The kind
    is clean or missing, and there are no weights.

    The cells of a CSV file are separated by commas, semicolons or tabs; the first line decides.

    - ``index``: number of the image. The training images come first, then those of the unlabeled part. It decides
      which image a row means only if the row has neither path nor content.
    - ``path`` (or ``filename``, ``filepath``, ``file_name``, ``image_path``, ``image``): absolute, or relative to the
      file's folder, to the current folder, or to the common folder of all images or of one part. In a row with an index
      or a content, the folders above the data may be others.
    - ``content``: hash of the image, as commands write it. It finds an image that was renamed. If no image has it, the
      file at the path is another by now, which is a warning.
    - ``label``: a class name, or a class number from 0 unless some class names are numbers. For kind coarse a
      superclass; for kind missing it is ignored.
    - ``kind``: clean (default), noisy, coarse or missing.
    - ``weight``: factor of the sample's hard loss, at least 0 (default 1).

    Other columns, and rows without label and kind (not labeled yet), are skipped. Rows whose image is gone are passed
    over with a warning. So are rows of the validation part whose label is the present one, without one.

    Args:
        path: Path of the file; ``.parquet`` needs the extra ``weak``.
        images: The training part, and optionally the unlabeled part.
        class_names: Names of the classes, by index.
        identities: Paths and contents of each part. Default: None, which means that they are read if a row has a
            content.
        targets: Labels of the training part, with earlier corrections; only (N,) class indices, and (N, L) zeros and
            ones of several labels, are used. Default: None, which means that they are unknown.
        group_names: Names of the superclasses.
        val_indices: Samples of the validation part. Rows with another label than that of ``targets`` are refused,
            unless they correct it.
        correct_val: Whether rows may correct labels of the validation part. Kind missing then removes a label. Default:
            False.

    Returns:
        The rows, by ascending sample.

    Raises:
        InputError: For a file that cannot be read, an unknown class, kind or index, class numbers that count from 1, an
            image with two labels, another label (without ``correct_val``) or a superclass for an image of the
            validation part, a weight out of range, and a file whose images are all gone. The message names the line.
    """
    several = label_columns(class_names) if targets is not None and has_several_labels(targets) else []
    cells = [*several, "kind"] if several else ["label", "kind"]
    rows = [(place, row) for place, row in _read_rows(path, several) if any(row.get(name) for name in cells)]
    if not rows:
        raise InputError(f"label_file: {path} has no row with a label or a kind")
    samples = _find_samples(path, rows, images, identities)
    classes, groups = ClassNumbers(class_names), ClassNumbers(group_names, "superclass", "superclasses")
    for numbers, kinds in () if several else ((classes, ("", "clean", "noisy")), (groups, ("coarse",))):
        labels = {row.get("label", "") for _, row in rows if row.get("kind", "") in kinds}
        try:
            numbers.check_first_number(labels)
        except InputError as error:
            raise InputError(f"label_file: {path}: {error}") from error
        if text := numbers.describe(labels):
            rank_zero_info(f"label_file: {path}: {text}")
    found: dict[int, LabelRow] = {}
    val = frozenset(val_indices)
    truth: list[Any] = [] if targets is None or several or targets.is_floating_point() else targets.tolist()
    if several and targets is not None:
        truth = [from_tensor(labels) for labels in targets]
    for (place, row), sample in zip(rows, samples, strict=True):
        if sample is None:
            continue
        try:
            if several:
                new = _read_several(sample, row, several)
            else:
                new = LabelRow(sample, *_read_label(row, classes, groups, group_names))
            if sample in val:
                label = new.label if several or new.kind != "missing" else IGNORE_INDEX
                if new.kind != "coarse" and [label] == truth[sample : sample + 1]:
                    continue
                if not correct_val:
                    raise InputError(
                        f"sample {sample} is in the validation part and cannot be trained on; correct_val: true "
                        "corrects its label"
                    )
                if new.kind == "coarse":
                    raise InputError(
                        f"sample {sample} is in the validation part, and cannot have a superclass as label"
                    )
            if found.setdefault(sample, new) != new:
                raise InputError(f"sample {row.get('path') or sample} comes twice, with another label")
        except InputError as error:
            raise InputError(f"label_file: {path}, {place}: {error}") from error
    if corrected := [sample for sample in found if sample in val]:
        rank_zero_info(f"label_file: {path} changes {len(corrected)} labels of the validation part")
    return [found[sample] for sample in sorted(found)]


def _find_samples(
    path: Path,
    rows: Sequence[tuple[str, dict[str, str]]],
    images: Sequence[Images],
    identities: Sequence[Identities] | None,
) -> list[int | None]:
    """Return the sample of each row, None for those that are gone, and warn of these."""
    folders = [str(Path.cwd()), os.path.abspath(path.parent)]  # noqa: PTH100  (resolve() would follow links)
    data, names = RowSamples(images, identities, folders), []
    for place, row in rows:
        try:
            names.append(_read_name(row, data))
        except InputError as error:
            raise InputError(f"label_file: {path}, {place}: {error}") from error
    found = data.find(names)
    texts = [repr(name.path or name.content or name.index) for name in names]
    if found.several:
        n = found.several[0]
        raise InputError(f"label_file: {path}, {rows[n][0]}: {texts[n]} fits several images; give the whole path")
    gone = [number for number, sample in enumerate(found.samples) if sample is None]
    if len(gone) == len(rows):
        others = f", nor any other of the {len(rows)} rows" if len(rows) > 1 else ""
        raise InputError(f"label_file: {path}, {rows[0][0]}: the data have no image {texts[0]}{others}")

    def report(numbers: list[int], text: str) -> str:
        n = numbers[0]
        return f"label_file: {path}: {len(numbers)} of {len(rows)} rows {text} ({rows[n][0]}: {texts[n]})"

    if gone:
        rank_zero_warn(report(gone, "name no image of the training data, and are passed over"))
    if found.changed:
        rank_zero_warn(
            report(found.changed, "name files whose content has changed since; their labels are taken by path")
        )
    if found.moved:
        rank_zero_info(report(found.moved, "name images that have another index or path now, and follow them"))
    return found.samples


def _read_name(row: dict[str, str], data: RowSamples) -> RowName:
    text, name, content = (row.get(column, "") for column in _NAMES)
    index = _parse_integer(text)
    if text and index is None:
        raise InputError(f"index must be an integer, got {text!r}")
    if not (text or name or content):
        raise InputError("there is neither an index nor a path")
    if index is not None and not (name or content) and not 0 <= index < len(data):
        raise InputError(f"there is no sample {index}; the data have 0 ... {len(data) - 1}")
    if index is None and not content and not data.has_paths:
        raise InputError(f"these images have no paths; give the index of {name!r}")
    return RowName(index, name, content)


def _read_label(
    row: dict[str, str], classes: ClassNumbers, groups: ClassNumbers, group_names: Sequence[str]
) -> tuple[int | str, str, float]:
    """Return class or superclass, kind and weight of a row."""
    kind, label = row.get("kind") or "clean", row.get("label", "")
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    number: int | str = -1
    if kind == "coarse":
        number = group_names[groups.find(label)]
    elif kind != "missing":
        number = classes.find(label)
    return number, kind, _parse_weight(row.get("weight") or "1")


def _read_several(sample: int, row: dict[str, str], columns: Sequence[str]) -> LabelRow:
    """Return the row of a sample with several labels; without any label it is of kind missing."""
    labels = read_cells(row, columns)
    kind = row.get("kind") or ("missing" if labels.count(None) == len(labels) else "clean")
    new = LabelRow(sample, labels, kind, _parse_weight(row.get("weight") or "1"))
    check_several(new.label, new.kind, new.weight, len(columns), "the row")
    return new if kind == "clean" else new._replace(label=[None] * len(labels))


# Rows.


def _read_rows(path: Path, several: Sequence[str]) -> Rows:
    """Each row and its place in the file; ``several`` are the columns of classes, if samples have several labels."""
    if several:
        columns, rows = read_table(path, "label_file")
        found = rename_columns(columns, several)
        kept = [name for name in columns if name in (*_COLUMNS, *PATH_COLUMNS)]
        names = {**{name: name for name in kept}, **found}
        rows = [(place, {new: row.get(name, "") for name, new in names.items()}) for place, row in rows]
        unread = [name for name in columns if name not in names]
        columns = [names.get(name, name) for name in columns]
        if not found and "kind" not in columns:
            raise InputError(
                f"label_file: {path} must have a column of zeros and ones for each class, such as {several[0]}, since "
                f"samples have several labels, got {', '.join(columns) or 'none'}"
            )
        if found and (absent := [name for name in several if name not in columns]):  # one may be misspelt
            text = f"has no column for the classes {', '.join(absent)}; its samples have no label of them"
            rest = f" (columns that are not read: {', '.join(unread)})" if unread else ""
            rank_zero_warn(f"label_file: {path} {text}{rest}")
    else:
        columns, rows = read_table(path, "label_file", {*_COLUMNS, *PATH_COLUMNS})
    if name := next((name for name in PATH_COLUMNS if name in columns), None):
        rows = [(place, row | {"path": row.get(name, "")}) for place, row in rows]
        columns = [*columns, "path"]
    if not {*_NAMES}.intersection(columns) or not {"label", "kind", *several}.intersection(columns):
        got = ", ".join(columns) or "none"
        raise InputError(f"label_file: {path} must have the columns index or path, and label or kind, got {got}")
    return rows


# Cells.


def _parse_integer(text: str) -> int | None:
    """The value of an integer, also of one written as 3.0, as in columns with empty cells; None for other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() and "_" not in text else None


def _parse_weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1e38:  # float32 holds no larger number
        raise InputError(f"weight must be a number of at least 0, below 1e38, got {text!r}")
    return weight
