"""Labels from a CSV or Parquet file, written by people or by the command ``clean``."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from kd_lightning.batch import LabelKind
from kd_lightning.data.sources.images import Images, path_of
from kd_lightning.errors import InputError

KINDS = {"clean": LabelKind.CLEAN, "noisy": LabelKind.NOISY, "coarse": LabelKind.COARSE, "missing": LabelKind.MISSING}
_COLUMNS = ("index", "path", "label", "kind", "weight")


class LabelRow(NamedTuple):
    """The label of one sample: a class by number or a superclass by name, its kind, and the weight of its loss."""

    sample: int
    label: int | str
    kind: str
    weight: float


def read_label_file(
    path: Path,
    images: Sequence[Images],
    *,
    class_names: Sequence[str],
    group_names: Sequence[str] = (),
    val_indices: Collection[int] = (),
) -> list[LabelRow]:
    """Read a label file with the columns ``index`` or ``path``, ``label``, and optionally ``kind`` and ``weight``.

    - ``index``: number of the image. The training images come first, then those of the unlabeled part.
    - ``path``: absolute, or relative to the file's folder, to the current folder, or to the common folder of all images
      or of one part. If the row has an index, too, only the file names are compared.
    - ``label``: a class name, or a class number unless some class names are numbers. For kind coarse a superclass; for
      kind missing it is ignored.
    - ``kind``: clean (default), noisy, coarse or missing.
    - ``weight``: factor of the sample's hard loss, at least 0 (default 1).

    Other columns, and rows without label and kind (not labeled yet), are skipped.

    Args:
        path: Path of the file; ``.parquet`` needs the extra ``weak``.
        images: The training part, and optionally the unlabeled part.
        class_names: Names of the classes, by index.
        group_names: Names of the superclasses.
        val_indices: Samples of the validation part. Rows of these are refused.

    Returns:
        The rows, by ascending sample.

    Raises:
        InputError: For a file that cannot be read, an unknown class, kind, image or index, an image that comes twice or
            is in the validation part, and a weight out of range. The message names the line.
    """
    found: dict[int, LabelRow] = {}
    classes, groups, val_indices = _numbers(class_names), _numbers(group_names), frozenset(val_indices)
    by_path: dict[str, int] = {}
    folders = [str(Path.cwd()), os.path.abspath(path.parent)]  # noqa: PTH100  (resolve() would follow links)
    for place, row in _read_rows(path):
        if not row.get("label") and not row.get("kind"):
            continue
        try:
            if row.get("index"):
                sample = _check_index(row["index"], row.get("path"), images)
            else:
                by_path = by_path or _samples_by_path(images)
                sample = _find_sample(row.get("path", ""), by_path, folders)
            if sample in found:
                raise InputError(f"sample {row.get('path') or sample} comes twice")
            if sample in val_indices:
                raise InputError(f"sample {sample} is in the validation part and cannot be trained on")
            kind, label = row.get("kind") or "clean", row.get("label", "")
            if kind not in KINDS:
                raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
            number: int | str = -1
            if kind == "coarse":
                number = group_names[_find_number(label, groups, "superclass")]
            elif kind != "missing":
                number = _find_number(label, classes, "class")
            found[sample] = LabelRow(sample, number, kind, _parse_weight(row.get("weight") or "1"))
        except InputError as error:
            raise InputError(f"label_file: {path}, {place}: {error}") from error
    if not found:
        raise InputError(f"label_file: {path} has no row with a label or a kind")
    return [found[sample] for sample in sorted(found)]


# Rows.


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row and its place in the file, ``line N`` or ``row N``."""
    if not path.is_file():
        raise InputError(f"label_file: there is no file {path}")
    if path.suffix.lower() == ".parquet":
        columns, rows = _read_parquet(path)
    else:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
                rows = [(f"line {reader.line_num}", row) for row in reader]
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"label_file: {path} cannot be read as CSV: {error}") from error
    if not {"index", "path"}.intersection(columns) or not {"label", "kind"}.intersection(columns):
        got = ", ".join(columns) or "none"
        raise InputError(f"label_file: {path} must have the columns index or path, and label or kind, got {got}")
    if twice := [name for name in _COLUMNS if list(columns).count(name) > 1]:
        raise InputError(f"label_file: {path} has the column {twice[0]} twice")
    for place, row in rows:
        if None in row:
            raise InputError(f"label_file: {path}, {place}: there are more cells than columns")
        yield place, {name: _text(row[name]) for name in _COLUMNS if name in row}


def _read_parquet(path: Path) -> tuple[Sequence[str], list[tuple[str, dict[str, Any]]]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"label_file: {path} needs pyarrow: pip install 'kd-lightning[weak]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            read = [name for name in dict.fromkeys(columns) if name in _COLUMNS]
            rows = file.read(columns=read).to_pylist() if len({*columns}) == len(columns) else []
    except (OSError, ValueError) as error:
        raise InputError(f"label_file: {path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    return columns, [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()


# Cells.


def _parse_integer(text: str) -> int | None:
    """The value of an integer, also of one written as 3.0, as in columns with empty cells; None for other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() and "_" not in text else None


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """Class numbers by label: by name if it is unique, and by number unless some names are numbers."""
    names = [name.strip() for name in names]  # cells are stripped, too
    counts = Counter(names)
    numbers = {} if any(map(str.isdecimal, names)) else {str(number): number for number in range(len(names))}
    return {name: number for number, name in enumerate(names) if counts[name] == 1} | numbers


def _find_number(label: str, numbers: dict[str, int], what: str) -> int:
    number = numbers.get(label, numbers.get(str(_parse_integer(label))))
    if number is None:
        known = ", ".join([*numbers][:20]) or "none: data.coarse names them"
        raise InputError(f"{label!r} is no {what}; there are {known}")
    return number


def _parse_weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1e38:  # float32 holds no larger number
        raise InputError(f"weight must be a number of at least 0, below 1e38, got {text!r}")
    return weight


def _check_index(text: str, name: str | None, images: Sequence[Images]) -> int:
    """The sample of an index; its file must have this name, if the row and the image have one."""
    index, size = _parse_integer(text), sum(map(len, images))
    if index is None:
        raise InputError(f"index must be an integer, got {text!r}")
    if not 0 <= index < size:
        raise InputError(f"there is no sample {index}; the data have 0 ... {size - 1}")
    known = path_of(images, index)
    if name and known and Path(name).name != Path(known).name:  # moved folders are fine
        raise InputError(f"sample {index} is {known}, not {name}")
    return index


# Paths.


def _samples_by_path(images: Sequence[Images]) -> dict[str, int]:
    """The sample of each path that a row may hold; -1 if several images fit.

    These are the absolute path, and the paths relative to the common folder of the image's part and of all images.
    """
    size = sum(map(len, images))
    known = [(n, os.path.abspath(path)) for n in range(size) if (path := path_of(images, n))]  # noqa: PTH100
    found: dict[str, int] = {}
    for first, end in dict.fromkeys([(0, size), *pairwise(accumulate(map(len, images), initial=0))]):
        part = [(number, path) for number, path in known if first <= number < end]
        folder = os.path.commonpath([os.path.dirname(path) for _, path in part]) if part else ""  # noqa: PTH120
        for number, path in part:
            for name in (path, path.removeprefix(folder).lstrip(os.sep)):
                found[name] = number if found.get(name, number) == number else -1
    return found


def _find_sample(name: str, by_path: dict[str, int], folders: Sequence[str]) -> int:
    if not name:
        raise InputError("there is neither an index nor a path")
    if not by_path:
        raise InputError(f"these images have no paths; give the index of {name!r}")
    keys = (os.path.normpath(os.path.join(start, name)) for start in ("", *folders))  # noqa: PTH118  (faster than Path)
    found = {by_path[key] for key in keys if key in by_path}
    if not found:
        raise InputError(f"the data have no image {name!r}")
    if len(found) > 1 or -1 in found:
        raise InputError(f"{name!r} fits several images; give the whole path")
    return found.pop()
