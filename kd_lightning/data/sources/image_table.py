"""A source of a folder of images and a table of their labels."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.sources.image_files import IMAGE_ENDINGS, FlatFolder
from kd_lightning.data.sources.image_loader import Loader, load_image
from kd_lightning.data.sources.image_names import ImageNames, relative_path
from kd_lightning.data.sources.report_once import report_once
from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.data.tables import PATH_COLUMNS, Rows, read_table
from kd_lightning.data.transforms.recipes import photo_side, photo_transforms
from kd_lightning.errors import InputError

_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "choice")
_SPLIT_COLUMNS = ("split", "subset", "partition")
_WEIGHT_COLUMNS = ("weight",)
_ID_COLUMNS = ("id", "image_id")
_SPLITS = {
    "train": ("", "train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_MOST = 10  # names in a message
_WHOLE = re.compile("-?[0-9]+")


class ImageTable(Source):
    """A folder of images, at any depth, and a CSV or Parquet file with a row for each.

    Columns are found by their usual names, or named here:

    - the image: ``path``, ``filename``, ``filepath``, ``file_name``, ``image_path``, ``image``, ``id`` or ``image_id``.
      A path is relative to the folder. Folders at its beginning may be missing, or be others above the folder, and its
      ending may be missing. Addresses of labelling tools are read, too, such as those of Label Studio's uploads and
      local files. Names are compared in Unicode NFC.
    - the label: ``label``, ``class``, ``class_name``, ``category``, ``target`` or ``choice``. An empty cell means none.
      Labels are class names; whole numbers are sorted as numbers. Without such a column, all columns of zeros and ones
      are labels of a multilabel task; so are cells in which Label Studio has several choices.
    - ``split``, ``subset`` or ``partition``: train (also an empty cell), val, test or unlabeled.
    - ``group``, if ``group`` names it: no group, such as a patient, stands in two of training, validation and test.
    - ``weight``: factor of the hard loss of a training sample, at least 0; an empty cell means 1.

    Samples are sorted by path, so that the order of rows does not matter. An image may have several rows, as of several
    annotators, if they agree in these columns. Rows without an image are passed over with a warning. Images without a
    row are counted, and left out unless ``others`` is true.

    Args:
        table: The file.
        folder: Folder of the images. Default: None, which means the table's folder.
        image: Name of the column of images. Default: None, which means the usual names.
        label: Name of the column of labels, or of several ones of zeros and ones. Default: None, which means the usual
            names.
        numbers: Whether labels are numbers to predict (regression): floats, NaN in empty cells.
        group: Name of the column of groups. An empty cell means a group of its own. Default: None, which means none.
        separator: Separates several class names in a cell, for the multilabel task. Default: None, which means one.
        others: Whether images without a row are the unlabeled part, with those of split unlabeled.
        unlabeled: Another folder of images without labels, at any depth, which join the unlabeled part. An image that
            has a row stays in its part. Default: None, which means none.
        image_size: Height and width in pixels that the default transforms crop, or one number for a square; at least 1.
        loader: Function from the path of a file to a picture, see :class:`~kd_lightning.data.ImageFolder`.
        endings: Endings of the files that ``loader`` reads. Default: None, which means those of images.

    Raises:
        InputError: If ``image_size`` is out of range, or options do not fit each other.
    """

    def __init__(
        self,
        table: str,
        folder: str | None = None,
        image: str | None = None,
        label: str | list[str] | None = None,
        numbers: bool = False,
        group: str | None = None,
        separator: str | None = None,
        others: bool = False,
        image_size: int | tuple[int, int] = 224,
        loader: Loader = load_image,
        endings: list[str] | None = None,
        unlabeled: str | None = None,
    ) -> None:
        if separator is not None and (numbers or isinstance(label, list) or not separator):
            raise InputError(f"separator: {separator!r} is for one column of class names")
        if isinstance(label, list) and not 0 < len(label) == len({*label}):
            raise InputError(f"label must be the name of a column, or different names of several, got {label}")
        self.table = Path(table).expanduser()
        self.folder = str(self.table.parent) if folder is None else folder
        self.image = image
        self.label = label
        self.numbers = numbers
        self.group = group
        self.separator = separator
        self.others = others
        self.unlabeled = unlabeled
        self.loader = loader
        self.endings = IMAGE_ENDINGS if endings is None else tuple(ending.lower() for ending in endings)
        self.train_transform, self.eval_transform = photo_transforms(image_size)
        self.stored_side = photo_side(image_size)

    def load(self) -> Parts:
        """Read the table, and find the images.

        Raises:
            InputError: If the file cannot be read, a column is missing, a path fits several images, an image has two
                rows that differ, or a cell cannot be used. The message names the row.
        """
        columns, rows = read_table(self.table, "table")
        image = self._column("image", self.image, (*PATH_COLUMNS, *_ID_COLUMNS), columns)
        if image is None:
            raise self._error(
                f"must have a column of images, such as {', '.join(PATH_COLUMNS[:3])}, got {_some(columns)}"
            )
        split = self._column("split", None, _SPLIT_COLUMNS, columns)
        named = [self.label] if isinstance(self.label, str) else self.label or []
        weight = self._column("weight", None, _WEIGHT_COLUMNS, [name for name in columns if name not in named])
        if weight is not None:
            report_once(f"table: the column {weight} weighs the hard loss of training samples")
        group = None if self.group is None else self._column("group", self.group, (), columns)
        label = self._label_columns([name for name in columns if name not in (image, split, weight, group)], rows)
        files = FlatFolder("folder", self.folder, self.loader, self.endings)
        used = [*([label] if isinstance(label, str) else label), *filter(None, (split, weight, group))]
        found = self._find(rows, image, used, files)
        parts: dict[str, list[int]] = {name: [] for name in _SPLITS}
        for path in sorted(found):
            parts[self._split_of(*rows[found[path]], split)].append(found[path])
        paths = {number: path for path, number in found.items()}
        targets, names = self._targets(rows, [number for part in parts.values() for number in part], label)

        def part_of(name: str) -> Part | None:
            numbers = parts[name]
            if not numbers:
                return None
            y = torch.stack([targets[number] for number in numbers])
            weights = None if weight is None or name != "train" else self._weights(rows, numbers, weight)
            images = ListedImages([paths[n] for n in numbers], files.root, self.loader)
            return Part(
                images, y, weights=weights, groups=None if group is None else [rows[n][1][group] for n in numbers]
            )

        train = part_of("train")
        if train is None:
            raise self._error("has no row of split train whose image is there")
        unlabeled = {paths[n]: "" if group is None else rows[n][1][group] for n in parts["unlabeled"]}
        rest = sorted({*files.paths} - {*found})
        if rest:
            what = "unlabeled" if self.others else "left out; unlabeled with others: true"
            images = "1 image" if len(rest) == 1 else f"{len(rest)} images"
            example = relative_path(rest[0], files)
            report_once(f"table: {images} of {self.folder} without a row ({example}): {what}")
        unlabeled |= dict.fromkeys(rest, "") if self.others else {}
        if self.unlabeled is not None:
            more = FlatFolder("unlabeled", self.unlabeled, self.loader, self.endings).paths
            known = {os.path.realpath(path) for path in (*found, *unlabeled)}
            unlabeled |= dict.fromkeys([path for path in more if os.path.realpath(path) not in known], "")
        pool_paths = sorted(unlabeled)
        pool = ListedImages(pool_paths, files.root, self.loader) if unlabeled else None
        pool_groups = [unlabeled[path] for path in pool_paths] if unlabeled and group is not None else None
        return Parts(train, part_of("test"), pool, names, val=part_of("val"), pool_groups=pool_groups)

    # Columns.

    def _column(self, what: str, name: str | None, usual: Sequence[str], columns: Sequence[str]) -> str | None:
        """Return the column of a name, or the only one of the usual names; None if there is none."""
        if name is not None:
            if name not in columns:
                raise self._error(f"must have the column {name!r} that {what} names, got {_some(columns)}")
            return name
        by_lower = {column.lower(): column for column in reversed(columns)}
        found = [by_lower[one] for one in usual if one in by_lower]
        if len(found) > 1 and what in ("label", "split"):
            raise self._error(f"has the columns {_some(found)}; name the right one by {what}, or remove the others")
        return found[0] if found else None

    def _label_columns(self, columns: list[str], rows: Rows) -> str | list[str]:
        if isinstance(self.label, list):
            for name in self.label:
                self._column("label", name, (), columns)
            return self.label
        if (found := self._column("label", self.label, _LABEL_COLUMNS, columns)) is not None:
            return found
        cells = {name: {row.get(name, "") for _, row in rows} - {""} for name in columns}
        binary = [name for name, found in cells.items() if found and found <= {"0", "1", "0.0", "1.0"}]
        if not binary or self.numbers or self.separator is not None:
            raise self._error(f"must have a column of labels; name it by label; it has {_some(columns)}")
        report_once(f"table: {len(binary)} columns of zeros and ones are labels: {_some(binary)}")
        return binary

    # Rows.

    def _find(self, rows: Rows, column: str, used: Sequence[str], files: FlatFolder) -> dict[str, int]:
        """Return {path: number of its row}. Rows of one image must have the same cells in the columns that are used."""
        images = ImageNames(files)
        found: dict[str, int] = {}
        gone: list[str] = []
        for number, (place, row) in enumerate(rows):
            if not row[column]:
                raise self._error(f"{place}: the cell of {column} is empty")
            fits = images.find(row[column])
            if len(fits) > 1:
                several = _some([relative_path(path, files) for path in sorted(fits)])
                raise self._error(f"{place}: {row[column]!r} fits several images: {several}; give the whole path")
            if not fits:
                gone.append(f"{place}: {row[column]!r}")
                continue
            (path,) = fits
            there, first = rows[found.setdefault(path, number)]
            if name := next((name for name in used if row[name] != first[name]), None):
                raise self._error(f"{place}: {row[column]!r} has {name} {row[name]!r}, but {first[name]!r} in {there}")
        if len(gone) == len(rows):
            first_row = f" ({gone[0]})" if gone else ""
            raise self._error(f"{self.folder} has no image of any of its {len(rows)} rows{first_row}")
        if gone:
            rank_zero_warn(
                f"table: {self.table}: {len(gone)} of {len(rows)} rows name no image of {self.folder}, and are passed "
                f"over ({gone[0]})"
            )
        return found

    def _split_of(self, place: str, row: dict[str, str], column: str | None) -> str:
        text = "" if column is None else row[column].lower()
        for name, texts in _SPLITS.items():
            if text in texts:
                return name
        raise self._error(f"{place}: {column} must be one of train, val, test, unlabeled, got {row[column or '']!r}")

    def _weights(self, rows: Rows, numbers: Sequence[int], column: str) -> Tensor:
        values = [self._number(rows[number][0], column, rows[number][1][column] or "1") for number in numbers]
        for number, value in zip(numbers, values, strict=True):
            if not 0 <= value < 1e38:  # float32 holds no larger number
                raise self._error(f"{rows[number][0]}: {column} must be at least 0, below 1e38, got {value}")
        return torch.tensor(values)

    def _targets(
        self, rows: Rows, numbers: Sequence[int], label: str | list[str]
    ) -> tuple[dict[int, Tensor], list[str] | None]:
        """Return the label of each row, and the names of the classes."""
        if isinstance(label, list):
            return {
                number: torch.tensor([self._zero_or_one(rows[number], name) for name in label]) for number in numbers
            }, label
        cells = {number: rows[number][1][label] for number in numbers}
        if self.numbers:
            floats = {n: self._number(rows[n][0], label, cell) if cell else math.nan for n, cell in cells.items()}
            return {number: torch.tensor(value) for number, value in floats.items()}, None
        if self.separator is not None or any(map(_choices, cells.values())):
            several = {n: [*map(normal_name, self._names_of(cell))] for n, cell in cells.items() if cell}
            names = _sorted_names({name for found in several.values() for name in found if name})
            missing = torch.full((len(names),), math.nan)
            one = {
                n: torch.tensor([float(name in found) for name in names]) for n, found in several.items() if any(found)
            }
            return {number: one.get(number, missing) for number in numbers}, names
        known = {number: _class_name(cell) for number, cell in cells.items() if cell}
        names = _sorted_names({*known.values()})
        if not names:
            raise self._error(f"has no label in the column {label}")
        index = {name: number for number, name in enumerate(names)}
        return {n: torch.tensor(index[known[n]] if n in known else IGNORE_INDEX) for n in numbers}, names

    def _names_of(self, cell: str) -> list[str]:
        """Return the names of a cell that may hold several."""
        return _choices(cell) or ([cell] if self.separator is None else cell.split(self.separator))

    def _zero_or_one(self, placed: tuple[str, dict[str, str]], column: str) -> float:
        place, row = placed
        if not row[column]:
            return math.nan
        value = self._number(place, column, row[column])
        if value not in (0, 1) and not self.numbers:
            raise self._error(f"{place}: {column} must be 0, 1 or empty, got {row[column]!r}")
        return value

    def _number(self, place: str, column: str, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise self._error(f"{place}: {column} must be a number, got {text!r}") from None

    def _error(self, text: str) -> InputError:
        return InputError(
            f"table: {self.table} {text}" if not text.startswith(("line", "row")) else f"table: {self.table}, {text}"
        )


class ListedImages(Dataset[Any]):
    """Images of a list of files; items are images.

    Args:
        paths: Path of each image.
        root: Folder that they lie in.
        loader: Function from the path of a file to a picture.
    """

    def __init__(self, paths: list[str], root: str, loader: Loader = load_image) -> None:
        self.paths = paths
        self.root = root
        self.loader = loader

    def __getitem__(self, index: int, /) -> Any:
        return self.loader(self.paths[index])

    def __len__(self) -> int:
        return len(self.paths)


def _choices(cell: str) -> list[str] | None:
    """Return the names of a cell in which Label Studio has several choices, as JSON; None for any other cell."""
    if not cell.startswith('{"choices"'):
        return None
    try:
        return [*map(str, json.loads(cell)["choices"])]
    except (ValueError, TypeError):
        return None


def _class_name(cell: str) -> str:
    """Return a class name; 3.0, as tables with empty cells have it, is 3."""
    whole = cell.removesuffix(".0")
    return normal_name(whole if whole != cell and _WHOLE.fullmatch(whole) else cell)


def _sorted_names(names: set[str]) -> list[str]:
    """Sort names; whole numbers by value."""
    if names and all(map(_WHOLE.fullmatch, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:_MOST])) + ", ..." * (len(names) > _MOST)
