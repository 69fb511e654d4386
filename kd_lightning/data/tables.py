"""Read tables: CSV files of any usual separator and encoding, and Parquet files."""

from __future__ import annotations

import csv
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.runs.spreadsheet import unescape_cell

_SEPARATORS = ",;\t"  # spreadsheets write all three

Rows = list[tuple[str, dict[str, str]]]
"""Each row's place in the file, ``line N`` or ``row N``, and its cells by column, as texts without space around."""
PATH_COLUMNS = ("path", "filename", "filepath", "file_name", "image_path", "image")
"""Usual names of the column of paths. The first one that a table has counts."""


def read_table(path: Path, key: str, only: Collection[str] | None = None) -> tuple[list[str], Rows]:
    """Read a table.

    The cells of a CSV file are separated by commas, semicolons or tabs; the first line decides. It is UTF-8, or UTF-16
    with a byte order mark. Texts that this package has escaped (``runs/spreadsheet.py``) are unescaped. An empty cell
    is an empty text, and so is a missing value of a Parquet file.

    Args:
        path: The file; ``.parquet`` needs the extra ``weak``.
        key: What names the file, for messages.
        only: Columns to read. Default: None, which means all.

    Returns:
        The names of all columns, and the rows.

    Raises:
        InputError: For a file that cannot be read, a column that is there twice, or a row with more cells than columns.
    """
    if not path.is_file():
        raise InputError(f"{key}: there is no file {path}")
    columns, rows = (_read_parquet if path.suffix.lower() == ".parquet" else _read_csv)(path, key, only)
    names = [name for name in columns if only is None or name in only]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"{key}: {path} has the column {twice[0]} twice")
    found = []
    for place, row in rows:
        if None in row:
            raise InputError(f"{key}: {path}, {place}: there are more cells than columns")
        found.append((place, {name: _text(row[name]) for name in names if name in row}))
    return [*columns], found


def _read_csv(path: Path, key: str, only: Collection[str] | None) -> tuple[Sequence[str], list[tuple[str, Any]]]:
    try:
        with path.open("rb") as file:
            encoding = "utf-16" if file.read(2) in (BOM_UTF16_BE, BOM_UTF16_LE) else "utf-8-sig"
        with path.open(newline="", encoding=encoding) as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, strict=True, delimiter=max(_SEPARATORS, key=header.count))
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            return columns, [(f"line {reader.line_num}", _unescaped(row)) for row in reader]
    except (OSError, csv.Error, UnicodeError) as error:
        raise InputError(f"{key}: {path} cannot be read as CSV: {error}") from error


def _read_parquet(path: Path, key: str, only: Collection[str] | None) -> tuple[Sequence[str], list[tuple[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{key}: {path} needs pyarrow: pip install 'kd-lightning[weak]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            read = [name for name in dict.fromkeys(columns) if only is None or name in only]
            rows = file.read(columns=read).to_pylist() if len({*columns}) == len(columns) else []
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    return columns, [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _unescaped(row: dict[Any, Any]) -> dict[Any, Any]:
    """Return a row with the texts that this package's tables have escaped, see ``runs/spreadsheet.py``."""
    return {name: unescape_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()
