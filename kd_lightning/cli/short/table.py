"""The table of pictures that a config reads: path, label and part of each, made once and kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from kd_lightning.cli.short.folder import PARTS, Pictures, split_test
from kd_lightning.data.sources.image_table import ImageTable
from kd_lightning.data.sources.images import printable
from kd_lightning.data.tables import read_table
from kd_lightning.errors import InputError
from kd_lightning.report.numbers import count_text
from kd_lightning.runs.spreadsheet import SafeWriter

TEST_SHARE = 0.2
LEAST = 4
"""Pictures that a class needs for a part in training, validation and test."""
_COLUMNS = ["path", "label", "split"]


def with_parts(pictures: Pictures, earlier: Path, *, test: bool) -> tuple[Pictures, list[str]]:
    """Give each picture its part: that of an earlier table, or if there is none, a test part that is sampled.

    Args:
        pictures: The pictures.
        earlier: The table, which need not exist. Its parts stay; new pictures train.
        test: Whether a test part is sampled if the folder has none.

    Returns:
        The pictures, and lines on what was done.

    Raises:
        InputError: If the earlier table cannot be read.
    """
    if earlier.is_file():
        return _as_before(pictures, earlier)
    if not test or pictures.counts("test"):
        return pictures, []
    chosen = split_test(pictures.pictures, pictures.contents, TEST_SHARE, LEAST)
    parts = [replace(one, part="test") if one.path in chosen else one for one in pictures.pictures]
    total = len(chosen) + pictures.counts("train").total() - len(chosen)
    text = (
        f"no test part: {len(chosen)} of {total} pictures, {100 * TEST_SHARE:.0f} % of each class, are it now (seed 0)"
    )
    return replace(pictures, pictures=parts), [text]


def _as_before(pictures: Pictures, table: Path) -> tuple[Pictures, list[str]]:
    columns, rows = read_table(table, "split.csv")
    if not {*_COLUMNS} <= {*columns}:
        raise InputError(f"{table} must have the columns {', '.join(_COLUMNS)}, got {', '.join(columns)}")
    before = {row["path"]: row["split"] or "train" for _, row in rows}
    if wrong := {*before.values()} - {*PARTS}:
        raise InputError(f"{table}: split must be one of {', '.join(PARTS)}, got {sorted(wrong)[0]!r}")
    now = {one.path for one in pictures.pictures}
    parts = [
        one if one.part == "unlabeled" else replace(one, part=before.get(one.path, "train"))
        for one in pictures.pictures
    ]
    lines = [f"the parts are those of {table}"]
    if new := sorted(now - before.keys()):
        lines.append(f"new, and training: {count_text(len(new), 'picture')} ({printable(new[0])})")
    if gone := sorted(before.keys() - now):
        lines.append(f"gone: {count_text(len(gone), 'picture')} of {table} ({printable(gone[0])})")
    return replace(pictures, pictures=parts), lines


def write_table(path: Path, pictures: Pictures) -> None:
    """Write the table, unless it is there with the same content.

    Raises:
        InputError: If a config would read other classes, parts or pictures from it.
    """
    listed = pictures.pictures
    more = ["weight"] if any(one.weight for one in listed) else []
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file, "\n")
        table.writerow([*_COLUMNS, *more])
        table.writerows([one.path, one.label, one.part, *[one.weight for _ in more]] for one in listed)
    try:
        _check_table(part, pictures)
        if not path.is_file() or path.read_bytes() != part.read_bytes():
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_table(path: Path, pictures: Pictures) -> None:
    """Raise InputError if a config would read other classes, parts or pictures from the table.

    Names that differ in space around them, or in ``1`` and ``1.0``, are one to it.
    """
    parts = ImageTable(str(path), str(pictures.root)).load()
    if parts.class_names != pictures.classes:
        other = sorted({*pictures.classes} ^ {*(parts.class_names or ())})
        raise InputError(f"FOLDER: names of classes differ in a table; rename {', '.join(map(repr, other[:3]))}")
    for name in ("train", "val", "test"):
        part = getattr(parts, name)
        found = [] if part is None else [os.path.relpath(one, pictures.root) for one in part.images.paths]
        listed = [os.path.normpath(one.path) for one in pictures.pictures if one.part == name]
        if found != listed:
            other = sorted({*found} ^ {*listed})
            raise InputError(f"FOLDER: names of pictures differ in a table; rename {', '.join(map(repr, other[:3]))}")
