"""The files of pictures that sources name."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kd_lightning.data.sources.image_files import IMAGE_ENDINGS, FlatFolder, is_system_name
from kd_lightning.data.tables import PATH_COLUMNS, read_table
from kd_lightning.errors import InputError

TABLES = (".csv", ".tsv", ".parquet")
STANDARD_INPUT = "-"
SIGNS = "*?["
"""Signs of a pattern."""


def find_pictures(sources: Sequence[str | Path], endings: tuple[str, ...] = IMAGE_ENDINGS) -> list[str]:
    """Return the paths of pictures, in the order of the sources. A path may come several times.

    Args:
        sources: Each is one of these:

            - a folder: all pictures below it, as :class:`~kd_lightning.data.sources.image_files.FlatFolder` finds them;
            - a table (``.csv``, ``.tsv``, ``.parquet``): its column ``path``, ``filename``, ``filepath``,
              ``file_name``, ``image_path`` or ``image``, in the order of its rows. Paths are relative to the table's
              folder, or to the working directory;
            - ``-``: the lines of standard input, or texts that end in a zero byte, as ``find -print0`` prints them;
            - a pattern of ``*``, ``?``, ``[...]`` and ``**``: the pictures and folders that fit, sorted by path;
            - anything else is the path of a picture, also if there is no such file.
        endings: Endings of pictures in folders and of patterns, in lower case.

    Raises:
        InputError: If there is no picture: for a folder, a table, a pattern, or all sources.
    """
    found = [path for source in sources for path in _paths_of(str(source), endings)]
    if not found:
        raise InputError(f"source: there is no picture in {', '.join(map(str, sources)) or 'an empty list'}")
    return found


def _paths_of(source: str, endings: tuple[str, ...]) -> Iterator[str]:
    path = Path(source).expanduser()
    if source == STANDARD_INPUT:
        yield from _lines_of_standard_input()
    elif path.is_dir():
        yield from FlatFolder("source", source, endings=endings).paths
    elif path.suffix.lower() in TABLES:
        yield from _column_of_paths(path)
    elif any(sign in source for sign in SIGNS) and not os.path.lexists(path):
        yield from _matches(str(path), endings)
    else:
        yield str(path)


def _matches(pattern: str, endings: tuple[str, ...]) -> list[str]:
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in SIGNS))
    found: set[str] = set()
    folders: set[Path] = set()
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207  (of an absolute pattern, too)
        path = Path(match)
        if any(map(is_system_name, path.parts[first:])) or not folders.isdisjoint(path.parents):
            continue
        if path.is_dir():
            folders.add(path)
            with suppress(InputError):  # it has no pictures
                found.update(FlatFolder("source", str(path), endings=endings).paths)
        elif match.lower().endswith(endings):
            found.add(str(path))
    if not found:
        raise InputError(f"source: no picture fits {pattern}")
    return sorted(found)


def _lines_of_standard_input() -> Iterator[str]:
    if sys.stdin is None:
        raise InputError("source: - is standard input, which is closed")
    content = sys.stdin.buffer.read()
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    yield from (os.fsdecode(line) for line in lines if line.strip())


def _column_of_paths(table: Path) -> Iterator[str]:
    columns, rows = read_table(table, "source", PATH_COLUMNS)
    name = next((name for name in PATH_COLUMNS if name in columns), None)
    if name is None:
        raise InputError(f"source: {table} must have a column {', '.join(PATH_COLUMNS)}, got {', '.join(columns)}")
    if not rows:
        raise InputError(f"source: {table} has no rows")
    for place, row in rows:
        cell = row.get(name, "")
        if not cell:
            raise InputError(f"source: {table}, {place}: the cell of {name} is empty")
        beside, here = table.parent / cell, Path(cell)
        if beside.exists() and here.exists() and not beside.samefile(here):
            raise InputError(
                f"source: {table}, {place}: {cell} is in the table's folder and in the working directory; give the "
                "whole path"
            )
        yield str(here if here.exists() and not beside.exists() else beside)
