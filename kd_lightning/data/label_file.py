"""Labels from a CSV or Parquet file: what people, or ``clean``, say of some of the samples."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_lightning.batch import Kind
from kd_lightning.errors import InputError

KINDS = {"clean": Kind.CLEAN, "noisy": Kind.NOISY, "coarse": Kind.COARSE, "missing": Kind.MISSING}


class Answer(NamedTuple):
    """What a file says of one sample: a class, or a superclass where the kind is coarse; and a weight of its loss."""

    sample: int
    label: int
    kind: str
    weight: float


def read_answers(
    path: Path,
    *,
    size: int,
    path_of: Callable[[int], str | None],
    class_names: Sequence[str],
    group_names: Sequence[str],
) -> list[Answer]:
    """Read a file with the columns ``index`` or ``path``, ``label``, and maybe ``kind`` and ``weight``.

    ``index`` counts the training images, then those of the unlabeled part. A ``path`` may be absolute, or count from
    the file's folder, or from the folder that has all images. ``label`` is a class by name or number; of kind
    ``coarse``, a superclass; of kind ``missing``, anything. ``kind`` is one of clean (the default), noisy, coarse and
    missing; ``weight``, at least 0, multiplies the sample's hard loss. Other columns are not read, and rows with
    neither label nor kind are those that nobody has answered yet.

    Args:
        path: Of the file; ``.parquet`` needs the extra ``weak``.
        size: Number of images.
        path_of: The path of an image by index, where it has one.
        class_names: By class index.
        group_names: Of the superclasses.

    Raises:
        InputError: For a file that is none, and for an unknown class, kind, image or index, an image that comes twice,
            and a weight out of range; the message names the line.
    """
    found: dict[int, Answer] = {}
    by_path: dict[str, int] = {}
    for line, row in _rows(path):
        label, kind = row.get("label", ""), row.get("kind", "")
        if not label and not kind:
            continue
        kind = kind or "clean"

        def wrong(text: str, line: int = line) -> InputError:
            return InputError(f"labels: {path}, line {line}: {text}")

        if kind not in KINDS:
            raise wrong(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if row.get("index"):
            try:
                index = int(float(row["index"]))
            except ValueError as error:
                raise wrong(f"index must be a number, got {row['index']!r}") from error
            if not 0 <= index < size:
                raise wrong(f"there is no sample {index}; the data have 0 ... {size - 1}")
        else:
            by_path = by_path or dict(_paths(size, path_of))
            index = _look_up(row.get("path", ""), by_path, path.parent)
            if index < 0:
                raise wrong(f"the data have no image {row.get('path')!r}")
        if index in found:
            raise wrong(f"sample {row.get('path') or index} comes twice")
        number = -1
        if kind != "missing":
            names = group_names if kind == "coarse" else class_names
            number = _class_number(label, names)
            if number < 0:
                what = "superclass" if kind == "coarse" else "class"
                known = ", ".join(names[:20]) or "none: data.coarse names them"
                raise wrong(f"{label!r} is no {what}; there are {known}")
        try:
            weight = float(row.get("weight") or 1.0)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise wrong(f"weight must be a number of at least 0, got {row['weight']!r}")
        found[index] = Answer(index, number, kind, weight)
    if not found:
        raise InputError(f"labels: {path} has no row with a label or a kind")
    return [found[index] for index in sorted(found)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row and its line in the file."""
    if not path.is_file():
        raise InputError(f"labels: there is no file {path}")
    if path.suffix == ".parquet":
        table = _parquet(path)
        columns, rows = [*table], [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    else:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                rows, columns = list(reader), [*(reader.fieldnames or ())]
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"labels: {path} is no CSV file: {error}") from error
    if not {"index", "path"}.intersection(columns) or not {"label", "kind"}.intersection(columns):
        raise InputError(f"labels: {path} must have the columns index or path, and label, got {', '.join(columns)}")
    for number, row in enumerate(rows, 2):
        yield number, {name: _text(value) for name, value in row.items() if name is not None}


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"labels: {path} needs pyarrow: pip install 'kd-lightning[weak]'") from error
    try:
        table: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:
        raise InputError(f"labels: {path} is no Parquet file: {' '.join(str(error).split())}") from error
    return table


def _class_number(label: str, names: Sequence[str]) -> int:
    """By name; by number where no class is called that; -1 for neither."""
    if label in names:
        return names.index(label)
    return int(label) if label.isdecimal() and int(label) < len(names) else -1


def _paths(size: int, path_of: Callable[[int], str | None]) -> Iterator[tuple[str, int]]:
    """What an image may be called: its path, and the path from the folder that has all images."""
    paths = {index: path for index in range(size) if (path := path_of(index)) is not None}
    root = os.path.commonpath([Path(path).parent for path in paths.values()]) if paths else ""
    for index, path in paths.items():
        yield str(Path(path).relative_to(root)), index
    for index, path in paths.items():
        yield os.path.abspath(path), index  # noqa: PTH100  (resolve() would follow links)


def _look_up(name: str, by_path: dict[str, int], folder: Path) -> int:
    if not name:
        return -1
    for key in (os.path.abspath(name), os.path.abspath(folder / name), os.path.normpath(name)):  # noqa: PTH100
        if key in by_path:
            return by_path[key]
    return -1
